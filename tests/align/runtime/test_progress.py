import os
import pty
import re
import subprocess
import sys
import time

import pytest

from align.runtime import consoles
from align.runtime.progress import ProgressBar

ON_A_TERMINAL = """
from align.runtime import consoles
from align.runtime.progress import ProgressBar
figures = dict(episodes=1234567, reward=-0.0012345, gold=-0.0012345, kl=123.456, length=1234.5)
with ProgressBar("ppo", 2) as progress:
    progress.advance(1, 10, **figures)
    progress.advance(2, 10, **figures)
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


def test_a_terminal_has_a_live_table_that_fits_eighty_columns() -> None:
    written = shown_on_a_terminal()
    assert "2/2" in written
    assert "\x1b[" in written
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    header = next(line for line in lines if "reward" in line)
    assert header.split() == ["step", "episodes", "reward", "gold", "kl", "length", "seconds"]
    assert any(line.split()[:3] == ["2", "1,234,567", "-0.00123"] for line in lines)


def test_nothing_is_printed_where_the_console_is_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consoles.progress_console, "quiet", True)
    with ProgressBar("sft", 1) as progress:
        progress.advance(1, 10, loss=0.5)
    assert capsys.readouterr() == ("", "")


def shown_on_a_terminal() -> str:
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
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
    return written.decode()
