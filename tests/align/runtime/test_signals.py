import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from align.runtime.signals import StopRequest, graceful_stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEPS = """
import os, signal
from align.runtime.signals import graceful_stop
with graceful_stop() as stop:
    for step in (1, 2, 3):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        print(step, flush=True)
        if stop.requested:
            break
"""


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_no_stop_is_requested_at_first() -> None:
    with graceful_stop() as stop:
        assert not stop.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_stop_and_says_so_once(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with graceful_stop() as stop:
        send(number)
        assert stop.requested
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("stopping at the end of this step; repeat to stop at once") == 1


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_interrupts_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with graceful_stop():
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(second)


def test_the_previous_handlers_are_restored_afterwards() -> None:
    before = handlers()
    with graceful_stop():
        assert handlers() != before
    assert handlers() == before


def test_the_previous_handlers_are_restored_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ValueError, match="within"), graceful_stop():
        raise ValueError("within")
    assert handlers() == before


def test_a_later_block_starts_without_a_request() -> None:
    with graceful_stop():
        send(signal.SIGTERM)
    with graceful_stop() as stop:
        assert not stop.requested


def test_a_process_finishes_its_step_before_it_stops() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0
    assert done.stdout.split() == ["1", "2"]


FORKS = """
import multiprocessing, os, signal, threading, time
from align.runtime.signals import graceful_stop

def handlers(_):
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

def fork_and_terminate():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join()
    print(child.exitcode, flush=True)

with graceful_stop() as stop:
    fork_and_terminate()
    thread = threading.Thread(target=fork_and_terminate)
    thread.start()
    thread.join()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        seen = pool.map(handlers, range(4))
    print(seen == 4 * [[signal.default_int_handler, signal.SIG_DFL]], stop.requested, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(pool.map(handlers, [0])[0][1] == signal.SIG_IGN, flush=True)
        pool.close()
        pool.join()
"""


def test_forked_children_have_the_default_handlers_but_keep_others() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == ["-15", "-15", "True", "False", "True"]
    assert done.returncode == 0


STUCK = """
import hashlib, os, signal, subprocess, sys
from align.runtime import signals
signals.END_SECONDS = 0.2
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
with signals.graceful_stop(float(sys.argv[1]) or None, "resume it"):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # one call for many minutes, in which Python runs no handler
"""


def wait_for_end(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


@pytest.mark.parametrize("grace", ["0", "0.1"])
def test_the_process_ends_though_its_main_thread_never_returns_to_python(grace: str) -> None:
    command = [sys.executable, "-c", STUCK, grace]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    child = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.5)
    process.terminate()
    if grace == "0":
        time.sleep(0.1)  # or both signals would be one
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 130
    assert ("checkpoint.grace has passed" in errors) == (grace != "0")
    assert "resume it" in errors or grace == "0"
    wait_for_end(child)


def test_the_end_of_the_grace_period_interrupts_the_main_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with graceful_stop(grace=0.1, how_to_resume="resume it") as stop:
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(50)
        assert stop.repeated
    assert "checkpoint.grace has passed: the run ends with the last checkpoint; resume it" in capsys.readouterr().err


def signalled_in_a_block(stop: StopRequest) -> None:
    with stop.droppable():
        send(signal.SIGTERM)
        raise AssertionError("not interrupted")


def test_a_signal_interrupts_what_can_be_dropped() -> None:
    with graceful_stop() as stop:
        with pytest.raises(KeyboardInterrupt):
            signalled_in_a_block(stop)
        assert stop.requested
        assert stop.dropped
        assert not stop.drops


def test_nothing_that_can_be_dropped_begins_after_a_signal() -> None:
    with graceful_stop() as stop:
        with stop.droppable():
            pass
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), stop.droppable():
            raise AssertionError("entered after a signal")
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
        assert not stop.dropped


def test_a_function_that_must_not_be_interrupted_ends_first() -> None:
    ended = []

    def work(value: int) -> int:
        send(signal.SIGTERM)
        ended.append(value)
        return value

    with graceful_stop() as stop:
        with pytest.raises(KeyboardInterrupt), stop.droppable():
            stop.undroppable(work)(1)
        assert ended == [1]
    with graceful_stop() as stop:
        assert stop.undroppable(work)(2) == 2


def test_a_stop_that_no_signal_requested_drops_nothing() -> None:
    stop = StopRequest(requested=True)
    with stop.droppable():
        assert stop.undroppable(abs)(-1) == 1


CHILD = """
import multiprocessing, os, signal, time
from align.runtime.signals import graceful_stop

def signal_itself():
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)

with graceful_stop(grace=0.1) as stop:
    child = multiprocessing.get_context("fork").Process(target=signal_itself)
    child.start()
    child.join()
    time.sleep(0.5)
    print(child.exitcode, stop.requested, flush=True)
"""


def test_signals_of_a_forked_child_are_not_taken_for_those_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == ["0", "False"], done.stderr
    assert done.stderr == ""
