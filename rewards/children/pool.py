"""Calls a function in one or several child processes, each call within its time limit."""

import logging
import os
import pickle
import time
import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from policies.errors import UserError
from rewards.calls import Arguments
from rewards.children.process import GRACE_SECONDS, ChildProcess
from rewards.children.source import FunctionSource
from rewards.user_functions import Failure

log = logging.getLogger(__name__)

CHILD_POLL_SECONDS = 1.0
"""How often the pool looks whether a child that says nothing has ended."""
WARN_SECONDS = 60.0
"""After this time a running call is reported, and again whenever the time has doubled."""


@dataclass
class _Running:
    """A call in progress: the index of its batch, when it began, and after how many seconds it is reported next."""

    index: int
    start: float
    report_after: float = WARN_SECONDS


class FunctionPool:
    """Child processes that call one function. They start at the first call and end with `close`.

    Attributes:
        source: The function.
        parallel: The number of processes.
        timeout: Seconds that one call may take; None: no limit.
        one_by_one: Whether every response has a call, and so a time limit, of its own.
    """

    def __init__(
        self, source: FunctionSource, parallel: int = 1, timeout: float | None = None, one_by_one: bool = False
    ) -> None:
        self.source = source
        self.parallel = parallel
        self.timeout = timeout
        self.one_by_one = one_by_one
        self._children: list[ChildProcess] = []
        self._finalizer = weakref.finalize(self, _close_all, self._children, os.getpid())

    def check(self) -> None:
        """Load the function in a process that then ends. Raises UserError where it cannot be loaded."""
        try:
            self._start(1)
        finally:
            self.close()

    def parts(self, batch: Arguments) -> list[range]:
        """Split a batch into one part per process; responses to one prompt, which are adjacent, stay together."""
        count = len(batch)
        if self.one_by_one:
            return [range(i, i + 1) for i in range(count)]
        parts: list[range] = []
        start = 0
        for i in range(1, count + 1):
            is_boundary = i == count or batch.prompts[i] != batch.prompts[i - 1]
            is_full = i * self.parallel >= (len(parts) + 1) * count
            if is_boundary and is_full:
                parts.append(range(start, i))
                start = i
        return parts

    def call(self, batches: Sequence[Arguments]) -> list[list[Any] | Failure]:
        """Call the function on each of these batches, as many at a time as there are processes.

        Raises:
            UserError: The function can no longer be loaded, or a batch cannot be sent to another process.
        """
        waiting = deque((index, self._pickled(batch)) for index, batch in enumerate(batches))
        running: dict[ChildProcess, _Running] = {}
        outcomes: dict[int, list[Any] | Failure] = {}
        try:
            while waiting or running:
                self._start(min(self.parallel, len(waiting) + len(running)), running)
                for child in self._children:
                    if waiting and child not in running:
                        index, batch = waiting.popleft()
                        child.send(batch)
                        running[child] = _Running(index, time.monotonic())
                outcomes |= self._finished(running)
        except BaseException:  # KeyboardInterrupt too: no process is left in the middle of a call
            self.close(grace=0.0)
            raise
        return [outcomes[index] for index in range(len(batches))]

    def close(self, grace: float = GRACE_SECONDS) -> None:
        """End the processes and all that they have started; the next call starts new ones.

        Args:
            grace: Seconds in which they may end of their own accord before they are killed.
        """
        _close_all(self._children, os.getpid(), grace)

    def _start(self, count: int, running: Collection[ChildProcess] = ()) -> None:
        """Replace idle processes that have ended, and start others until `count` have loaded the function."""
        for child in [child for child in self._children if child not in running]:
            if child.has_ended():
                log.warning("%s: a process of %s has ended between two calls", self.source.key, self.source.where)
                self._discard(child)
        known = len(self._children)
        while len(self._children) < count:
            self._children.append(ChildProcess(self.source))
        for child in self._children[known:]:
            child.wait_until_loaded()

    def _finished(self, running: dict[ChildProcess, _Running]) -> dict[int, list[Any] | Failure]:
        """Wait for calls to finish, and remove those that have finished or run out of time from `running`."""
        outcomes: dict[int, list[Any] | Failure] = {}
        ready = wait([child.channel.end for child in running], self._seconds_to_wait(running))
        for child, call in list(running.items()):
            seconds = time.monotonic() - call.start
            if child.channel.end in ready or child.has_ended():
                outcome, is_usable = child.outcome()
            elif self.timeout is not None and seconds >= self.timeout:
                outcome = Failure(f"took longer than {self.timeout:g} s")
                is_usable = False
            else:
                self._report(call, seconds)
                continue
            outcomes[call.index] = outcome
            del running[child]
            if not is_usable:
                self._discard(child)
        return outcomes

    def _seconds_to_wait(self, running: dict[ChildProcess, _Running]) -> float:
        if self.timeout is None:
            return CHILD_POLL_SECONDS
        first = min(call.start for call in running.values())
        return min(CHILD_POLL_SECONDS, max(0.0, first + self.timeout - time.monotonic()))

    def _report(self, call: _Running, seconds: float) -> None:
        if seconds >= call.report_after:
            limit = "no time limit is set" if self.timeout is None else f"it is ended after {self.timeout:g} s"
            log.warning("%s: a call of %s has taken %.0f s; %s", self.source.key, self.source.where, seconds, limit)
            call.report_after *= 2

    def _discard(self, child: ChildProcess) -> None:
        child.close()
        self._children.remove(child)

    def _pickled(self, batch: Arguments) -> bytes:
        try:
            return pickle.dumps((list(batch.prompts), list(batch.responses), list(batch.columns)))
        except Exception as error:
            raise UserError(
                f"{self.source.key}: the columns cannot be sent to the process of {self.source.where}: {error}"
            ) from error


def _close_all(children: list[ChildProcess], owner: int, grace: float = 0.0) -> None:
    """End these processes, unless this process is a forked copy of the one that owns them."""
    if os.getpid() != owner:
        return
    if grace:
        for child in children:
            child.ask_to_end()
    for child in children:
        child.close(grace)
    children.clear()
