"""Stops a run when the user requests it: at the end of a step, or where nothing of it is worth finishing.

    first signal     the step ends; but rollouts and scoring are dropped, see `StopRequest.droppable`
    grace over       the run ends with the last checkpoint that was written
    second signal    the run ends at once

Python runs a signal's handler in the main thread, between two of its instructions. A thread of its own therefore
receives the signals too, and ends the process where the main thread does not get that far.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import psutil

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers

DEFAULT_HANDLERS: dict[signal.Signals, Handler] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}
"""The signals that request a stop, and what Python does about them by default."""

END_SECONDS = 5.0
"""Seconds in which the main thread may close files, workers and Ray once the run has to end."""

INTERRUPTED = 130
"""Exit status of a run that a signal has stopped."""

_active: list[Any] = []
"""The handlers of the blocks that have been entered."""

_held = threading.local()
"""The signal mask of a thread that forks."""


class Interrupted(Exception):
    """The user requested a stop; what was not to be lost has been written to a checkpoint."""


@dataclass
class StopRequest:
    """Whether the user has requested a stop; checked between steps.

    Attributes:
        requested: Whether a stop is requested.
        by_signal: Whether a signal has requested it.
        repeated: Whether another signal, or the end of the grace period, has requested the end of the run.
        drops: Whether the first signal raises KeyboardInterrupt in the main thread.
    """

    requested: bool = False
    by_signal: bool = False
    repeated: bool = False
    drops: bool = False

    @property
    def dropped(self) -> bool:
        """Whether a KeyboardInterrupt is that of a first signal in a `droppable` block."""
        return self.by_signal and not self.repeated

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Raise KeyboardInterrupt in the block at the first signal: what it does is of no use unless it is completed.

        It is raised at once where a signal has come before.
        """
        self.drops = True
        try:
            if self.by_signal:
                raise KeyboardInterrupt
            yield
        finally:
            self.drops = False

    def undroppable(self, function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        """Let a function end before a `droppable` block around it is interrupted.

        Args:
            function: The function; interrupted, it would leave something in a state that a checkpoint needs.
        """

        def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Returned:
            drops = self.drops
            self.drops = False
            result = function(*arguments, **named)
            self.drops = drops
            if drops and self.by_signal:
                raise KeyboardInterrupt
            return result

        return call


@contextmanager
def graceful_stop(grace: float | None = None, how_to_resume: str = "") -> Iterator[StopRequest]:
    """Handle SIGINT and SIGTERM within the block: the first requests a stop, the second raises KeyboardInterrupt.

    A child that is forked within the block, by a `multiprocessing.Pool` of the user's for instance, gets the default
    handlers: it has no step to finish, and whoever terminates it waits for its end.

    Args:
        grace: Seconds after the first signal at which KeyboardInterrupt is raised without a second; None: never.
        how_to_resume: What the user is told when they have passed.

    Yields:
        The request, which is set by the first signal.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.by_signal:
            stop.repeated = True
            raise KeyboardInterrupt
        stop.requested = True
        stop.by_signal = True
        when = "without the rollouts of this step" if stop.drops else "at the end of this step"
        print(f"\nstopping {when}; repeat to stop at once", file=sys.stderr, flush=True)
        if stop.drops:
            stop.drops = False
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in DEFAULT_HANDLERS}
    _active.append(handle)
    try:
        with _watchdog(grace, how_to_resume):
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _active.remove(handle)


@contextmanager
def _watchdog(grace: float | None, how_to_resume: str) -> Iterator[None]:
    """End the process within the block where a second signal, or the end of the grace period, has not done so."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, grace, how_to_resume), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        writer.close()
        thread.join()
        reader.close()


def _watch(reader: socket.socket, grace: float | None, how_to_resume: str) -> None:
    """Wait for two signals, or for one and the grace period, and then for the end of the block."""
    try:
        if not _receives_stop(reader, None):
            return
        try:
            if not _receives_stop(reader, grace):
                return
        except TimeoutError:
            message = f"checkpoint.grace has passed: the run ends with the last checkpoint; {how_to_resume}"
            print(message, file=sys.stderr, flush=True)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        reader.settimeout(END_SECONDS)
        while reader.recv(1):
            pass
    except TimeoutError:
        end_process(INTERRUPTED)


def _receives_stop(reader: socket.socket, seconds: float | None) -> bool:
    """Wait for a signal that requests a stop. Returns False where the block has ended.

    Raises:
        TimeoutError: The seconds have passed.
    """
    reader.settimeout(seconds)
    while number := reader.recv(1):
        if number[0] in DEFAULT_HANDLERS:  # Python writes the number of every signal that it handles
            return True
    return False


def end_process(status: int) -> None:
    """End this process and its children, the processes of a local Ray cluster for instance, without further ado.

    Args:
        status: The exit status.
    """
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    os._exit(status)


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
            signal.set_wakeup_fd(-1)  # or the parent would take the child's signals for its own
    _release_signals()


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_restore_default_handlers)
