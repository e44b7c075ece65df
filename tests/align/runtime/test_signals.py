import os
import signal
import subprocess
import sys

import pytest

from align.runtime.signals import graceful_stop

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
