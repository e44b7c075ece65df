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


def test_nothing_is_asked_for_at_first() -> None:
    with graceful_stop() as stop:
        assert not stop.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_for_an_end_and_says_so_once(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with graceful_stop() as stop:
        send(number)
        assert stop.requested
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("stopping at the end of this step; once more to stop at once") == 1


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_interrupts_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with graceful_stop():
        send(first)
        with pytest.raises(KeyboardInterrupt):
            send(second)


def test_the_handlers_from_before_are_back_afterwards() -> None:
    before = handlers()
    with graceful_stop():
        assert handlers() != before
    assert handlers() == before


def test_the_handlers_from_before_are_back_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ValueError, match="within"), graceful_stop():
        raise ValueError("within")
    assert handlers() == before


def test_a_later_block_does_not_know_of_an_earlier_request() -> None:
    with graceful_stop():
        send(signal.SIGTERM)
    with graceful_stop() as stop:
        assert not stop.requested


def test_a_process_ends_its_step_before_it_stops() -> None:
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0
    assert done.stdout.split() == ["1", "2"]
