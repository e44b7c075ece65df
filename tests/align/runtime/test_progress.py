import os
import pty
import re
import subprocess
import sys
import time

import pytest

from align.runtime.progress import ProgressBar

ON_A_TERMINAL = """
from align.runtime.progress import ProgressBar
with ProgressBar("ppo", 2) as progress:
    progress.advance(1, 10, loss=0.5)
    progress.advance(2, 10, loss=0.25)
"""


def pretend_elapsed(progress: ProgressBar, seconds: float) -> None:
    """Pretend that the process started, and last printed a line, this many seconds ago."""
    progress.started -= seconds
    progress.printed -= seconds


def line(capsys: pytest.CaptureFixture[str], first: int, *later: int, total: int, seconds: float) -> str:
    """The last line of a process that began with step `first` and has taken this many seconds."""
    with ProgressBar("ppo", total) as progress:
        progress.advance(first, 10)
        pretend_elapsed(progress, seconds)
        for step in later:
            progress.advance(step, 10)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_plain_line_has_stage_step_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("sft", 1) as progress:
        progress.advance(1, 10, loss=0.123456, episodes=12345)
    assert capsys.readouterr() == ("", "sft 1/1  loss 0.123  episodes 12,345  ETA 0:00\n")


def test_plain_lines_are_printed_every_few_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("sft", 100) as progress:
        for step in range(1, 101):
            progress.advance(step, 10)
            if step == 40:
                pretend_elapsed(progress, 6)
    lines = capsys.readouterr().err.splitlines()
    assert [text.split()[1] for text in lines if "ETA" in text] == ["41/100", "100/100"]


def test_a_plain_line_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("sft", 1) as progress:
        progress.advance(1, 10, loss=0.5)
    assert re.fullmatch(r"[ -~]+\n", capsys.readouterr().err)


def test_the_eta_is_the_pace_times_the_remaining_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert line(capsys, 1, 2, total=12, seconds=20).endswith("ETA 1:40")


def test_the_eta_of_a_resumed_run_follows_the_pace_of_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert line(capsys, 91, 92, total=100, seconds=20).endswith("ETA 1:20")


def test_an_eta_of_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert line(capsys, 1, 2, total=722, seconds=20).endswith("ETA 2:00:00")


def test_the_pace_is_told_once_and_leaves_the_first_step_out(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("ppo", 103) as progress:
        pretend_elapsed(progress, 100)  # until the end of the first step
        for step, tokens in enumerate((999_999, 2000, 3000, 4000), start=1):
            progress.advance(step, tokens)
            progress.first_step_ended -= 3
    lines = [text for text in capsys.readouterr().err.splitlines() if "ETA" not in text]
    assert lines == ["ppo: 3 s and 2,500 tokens per step, 5:00 to the end"]


def test_a_stage_of_few_steps_has_no_pace(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("sft", 3) as progress:
        for step in (1, 2, 3):
            progress.advance(step, 10)
    assert "per step" not in capsys.readouterr().err


def test_a_terminal_has_a_live_line() -> None:
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], stderr=terminal, env=environment)
    os.close(terminal)
    written = b""
    started = time.monotonic()
    while time.monotonic() - started < 50:
        try:
            written += os.read(controller, 4096)
        except OSError:  # the other end is closed
            break
    os.close(controller)
    assert process.wait(timeout=10) == 0
    assert b"2/2" in written
    assert b"\x1b[" in written
