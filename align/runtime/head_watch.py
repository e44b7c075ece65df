"""Watches the head of a run's Ray cluster, without which the run cannot go on.

Ray itself waits for minutes, in calls that no exception interrupts, and then ends the process without naming the
cluster. Here a thread connects to the head every few seconds, and ends the process where that keeps failing.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from align.runtime.signals import end_process

Built = TypeVar("Built")

CHECK_SECONDS = 4.0
"""Seconds between two attempts to connect, and seconds in which one must succeed."""
ATTEMPTS = 6
"""Attempts in a row that must fail before the head is lost: a head that is restarted is back before."""
FAILED = 1
"""Exit status of a run that has lost the head."""


@contextmanager
def head_watched(address: str, cluster: str, advice: str = "") -> Iterator[None]:
    """End this process within the block, with a message, where the head does not accept connections any more.

    Args:
        address: Host and port of the head.
        cluster: What the message calls the cluster: the setting that names it.
        advice: What the message ends with: what the user can do.
    """
    ended = threading.Event()
    message = f"error: {cluster}: the head of the cluster, {address}, accepts no connections any more"
    if advice:
        message += f"; {advice}"
    thread = _start_watch(address, message, ended)
    try:
        yield
    finally:
        ended.set()
        thread.join()


def build_watched(build: Callable[[], Built]) -> Built:
    """Build something in a Ray actor, and end its process where the head of its cluster is lost.

    The actor has no other way to learn that the run has ended, if it is not on the head's machine.

    Args:
        build: Builds it.
    """
    import ray  # slow to import

    address = ray.get_runtime_context().gcs_address
    _start_watch(address, f"the head of the cluster, {address}, accepts no connections any more", threading.Event())
    return build()


def _start_watch(address: str, message: str, ended: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=_watch, args=(address, message, ended), daemon=True, name="head")
    thread.start()
    return thread


def _watch(address: str, message: str, ended: threading.Event) -> None:
    failed = 0
    while not ended.wait(CHECK_SECONDS):
        failed = 0 if accepts(address) else failed + 1
        if failed == ATTEMPTS:
            print(message, file=sys.stderr, flush=True)
            end_process(FAILED)


def await_head(address: str) -> None:
    """Wait until the head accepts a connection; `head_watched` ends the process where it never does again."""
    while not accepts(address):
        time.sleep(1)


def accepts(address: str) -> bool:
    """Whether something accepts a connection at `HOST:PORT`."""
    try:
        connect(address, CHECK_SECONDS)
    except OSError:
        return False
    return True


def connect(address: str, seconds: float) -> None:
    """Connect to `HOST:PORT` and close the connection. Raises OSError where it is not accepted within the seconds."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
