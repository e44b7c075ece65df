"""The program of a child process: a keeper, and the worker that it forks before anything is loaded.

The keeper adopts every descendant of the worker, daemons included, because the kernel gives orphans to it. When the
worker ends, when the driver orders it or when the driver dies, the keeper kills them all and ends.

It is run as a file by `rewards.children.process`, and imports only the standard library before the fork.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from threading import Thread
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
"""From `linux/prctl.h`: orphans among the descendants become children of this process."""

DRIVER_POLL_SECONDS = 1.0
"""How often the keeper looks whether the driver lives. The end of the pipe tells it at once, unless another process
has inherited the pipe."""
SWEEP_SECONDS = 10.0
"""How long the keeper tries to kill what is left. A process that waits for a disk cannot be killed."""


def keep_worker() -> None:
    """Fork the worker, and wait for its end. The first argument is the setup as JSON."""
    setup = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    worker = os.fork()
    if worker == 0:
        _work(setup)
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.close(setup["channel"])
    Thread(target=_kill_when_ordered, args=(setup["driver"],), daemon=True).start()
    status = _wait_for(worker)
    _kill_and_reap_descendants()
    os._exit(status if status >= 0 else 128 - status)


def _work(setup: dict[str, Any]) -> None:
    """Become the worker: its signal handlers, no input, the limit on memory, and then the user's function."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _leave_to_driver)
    os.register_at_fork(after_in_child=_restore_default_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.set_inheritable(setup["channel"], False)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel kills this process and not the driver
    if setup["memory_gb"]:
        limit = int(setup["memory_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[:] = setup["path"]
    from rewards.children.worker import serve

    serve(setup)


def _leave_to_driver(number: int, frame: object) -> None:
    """Do nothing: Ray, for one, stops a job by a signal to each of its processes, and the driver decides what ends."""


def _restore_default_handler() -> None:
    """After a fork, in the child: a function must be able to terminate processes of its own."""
    if signal.getsignal(signal.SIGTERM) == _leave_to_driver:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _kill_when_ordered(driver: int) -> None:
    """Kill all descendants, again and again, once the driver writes to the pipe, closes it or dies."""
    while os.getppid() == driver:
        readable, _, _ = select.select([0], [], [], DRIVER_POLL_SECONDS)
        if readable:
            break
    while True:
        _kill_descendants()
        time.sleep(0.05)


def _wait_for(worker: int) -> int:
    """Reap children until the worker has ended. Returns its exit status, negative for a signal."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _kill_and_reap_descendants() -> None:
    end = time.monotonic() + SWEEP_SECONDS
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < end:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if not pid:
                _kill_descendants()
                time.sleep(0.005)


def _kill_descendants() -> None:
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    keep_worker()
