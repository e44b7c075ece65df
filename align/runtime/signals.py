"""Stops a run at the end of a step when the user requests it."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers

DEFAULT_HANDLERS: dict[signal.Signals, Handler] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
"""The signals that request a stop, and what Python does about them by default."""

_active: list[Any] = []
"""The handlers of the blocks that have been entered."""

_held = threading.local()
"""The signal mask of a thread that forks."""


class Interrupted(Exception):
    """The user requested a stop; the run has finished its step and written a checkpoint."""


@dataclass
class StopRequest:
    """Whether the user has requested a stop; checked between steps."""

    requested: bool = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM within the block: the first requests a stop, the second raises KeyboardInterrupt.

    A child that is forked within the block, by a `multiprocessing.Pool` of the user's for instance, gets the default
    handlers: it has no step to finish, and whoever terminates it waits for its end.

    Yields:
        The request, which is set by the first signal.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        print("\nstopping at the end of this step; repeat to stop at once", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in DEFAULT_HANDLERS}
    _active.append(handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _active.remove(handle)


def _hold_signals() -> None:
    """Before a fork: Python forgets a signal that reaches the child before it has set up its own handlers."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEFAULT_HANDLERS)


def _release_signals() -> None:
    """After a fork, in the parent."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _restore_default_handlers() -> None:
    """After a fork, in the child: take back the handlers of `graceful_stop`."""
    for number, default in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) in _active:
            signal.signal(number, default)
    _release_signals()


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_restore_default_handlers)
