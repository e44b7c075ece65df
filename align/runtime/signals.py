"""Stopping at the end of a step when the user asks for it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop, has ended its step and written a checkpoint."""


@dataclass
class StopRequest:
    """Whether the user has asked for an end; looked at between steps."""

    requested: bool = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks for an end after the step; the second interrupts at once."""
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nstopping at the end of this step; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
