"""Stops a run at the end of a step when the user requests it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The user requested a stop; the run has finished its step and written a checkpoint."""


@dataclass
class StopRequest:
    """Whether the user has requested a stop; checked between steps."""

    requested: bool = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM within the block: the first requests a stop, the second raises KeyboardInterrupt.

    Yields:
        The request, which is set by the first signal.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nstopping at the end of this step; repeat to stop at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
