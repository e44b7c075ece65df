"""`align report` in the terminal."""

import json
import sys
from pathlib import Path

import pytest
import typer

from align.cli import app, main
from align.diagnosis import diagnose
from tests.align.report.runs import step, write_lines, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "first")
    return tmp_path / "first"


def align(*arguments: object) -> None:
    typer.main.get_command(app)([str(argument) for argument in arguments], standalone_mode=False)


def test_quiet_prints_nothing_or_the_object_of_json_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align("report", run)
    assert f"report written to {run}/report/index.html" in capsys.readouterr().out
    align("report", run, "--quiet")
    assert capsys.readouterr() == ("", "")
    align("report", run, "--quiet", "--json")
    assert json.loads(capsys.readouterr().out)["report"] == f"{run}/report/index.html"


def test_a_report_reads_the_metrics_once_and_judges_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    read_bytes = Path.read_bytes

    def counting(path: Path) -> bytes:
        did.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counting)
    monkeypatch.setattr(diagnose, "RULES", (lambda _: did.append("judged"),))
    align("report", run)
    assert (did.count("metrics.jsonl"), did.count("judged")) == (1, 1)


@pytest.mark.parametrize("command", [["report"], ["compare", "--to", "page.html"], ["watch", "--port", "0"]])
def test_a_damaged_metric_ends_a_command_with_status_2(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(run.with_name("second"))
    write_lines(run / "metrics.jsonl", [step(1) | {"reward/mean": "high"}])
    runs = [str(run)] if command == ["report"] else [str(run.with_name("second")), str(run)]
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", ["align", *command, *runs])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f'error: {run}/metrics.jsonl, line 1: reward/mean is "high", expected a number')
