import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from align.cli import app
from align.config.schema import Experiment
from align.outputs.run_list import RunSummary, list_runs, runs_table, summarise
from align.runs.folder import RunFolder, begin_run, folder_of, locked
from align.runs.tracking import Tracker
from policies.errors import UserError

MINIMAL = {"model": {"path": "tiny"}, "data": {"prompts": "prompts.jsonl"}, "ppo": {"steps": 20}}


def make_run(runs: Path, name: str, *steps: dict[str, Any], done: tuple[str, ...] = (), age: float = 0) -> Path:
    """A run of 20 PPO steps that has logged these, as old as this many seconds."""
    experiment = Experiment.model_validate(MINIMAL | {"name": name, "runs": str(runs)})
    run = folder_of(experiment)
    begin_run(run, experiment)
    tracker = Tracker(run.path)
    for step, metrics in enumerate(steps, start=1):
        tracker.log("ppo", step, metrics)
    for folder in done:
        (run.path / folder).mkdir()
    for path in run.path.iterdir():
        changed = path.stat().st_mtime - age
        os.utime(path, (changed, changed))
    return run.path


def step(score: float, seconds: float = 3.0) -> dict[str, Any]:
    return {"reward/mean": score, "kl/per_sequence": 0.5, "time/update": seconds / 2, "time/step": seconds}


def test_a_running_run_has_its_newest_figures_and_the_time_to_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", step(0.1, seconds=5), step(0.2))
    with locked(RunFolder(run)):
        found = summarise(run)
    assert (found.state, found.stage, found.step, found.steps) == ("running", "ppo", 2, 20)
    assert (found.score, found.gold, found.kl) == (0.2, None, 0.5)
    assert found.seconds_left == pytest.approx(18 * 4.0)


@pytest.mark.parametrize(("done", "state"), [(("sft", "reward", "policy"), "done"), (("sft",), "stopped")])
def test_a_run_that_nobody_writes_is_done_or_stopped(done: tuple[str, ...], state: str, tmp_path: Path) -> None:
    found = summarise(make_run(tmp_path, "a", step(0.1), done=done))
    assert found.state == state
    assert found.seconds_left is None


def test_the_stage_is_the_last_that_has_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    Tracker(run).log("sft", 7, {"sft/loss": 1.0})
    found = summarise(run)
    assert (found.stage, found.step, found.steps, found.score) == ("sft", 7, None, None)


def test_a_run_that_cannot_be_read_is_listed_with_the_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    (run / "config.yaml").write_text("nmae: a\n")
    found = summarise(run)
    assert found.state == "unreadable"
    assert f"{run}/config.yaml: name is missing" in str(found.problem)


def test_a_run_with_a_damaged_reward_model_does_not_hide_the_others(tmp_path: Path) -> None:
    damaged = make_run(tmp_path, "a", step(0.5)) / "reward" / "diagnostics.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text('{"accuracy": 0.')
    make_run(tmp_path, "b", step(0.5))
    found = {run.name: run for run in list_runs(tmp_path)}
    assert (found["a"].state, found["b"].score) == ("unreadable", 0.5)
    assert str(damaged) in str(found["a"].problem)


def test_a_list_with_everything_fits_a_narrow_terminal() -> None:
    running = RunSummary("quickstart-0", "running", "ppo", 10, 20, -10.25, -10.25, 12.5, 36000, "KL too strong", 0.0)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(runs_table([running, replace(running, name="b", verdict="critic does not learn")], 80))
    text = capture.get()
    assert "quickstart-0 running ppo 10/20 -10.2 -10.2 12.5 ETA 10:00:00" in text
    assert "critic does" in text


def test_a_long_name_leaves_room_for_the_other_columns() -> None:
    run = RunSummary("x" * 120, "running", "ppo", 10, 20, -10.25, -10.25, 12.5, 36000, "KL too strong", 0.0)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(runs_table([run, replace(run, name="\x1b[31mb")], 80))
    text = capture.get()
    assert "running ppo 10/20 -10.2 -10.2 12.5 ETA 10:00:00" in text
    assert text.count("x") == 120
    assert {"too", "strong"} <= set(text.split())
    assert "\ufffd[31mb" in text


def test_runs_are_listed_by_when_they_were_written(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0), ("older", 200_000)):
        make_run(tmp_path, name, step(0.25), age=age)
    (tmp_path / "no run").mkdir()
    found = list_runs(tmp_path)
    assert [run.name for run in found] == ["new", "old", "older"]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(runs_table(found, 80))
    lines = capture.get().splitlines()
    assert [line.split("  0.5 ")[-1].strip() for line in lines[1:]] == ["now", "2 h ago", "2 d ago"]
    assert "diagnosis" not in lines[0]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder: name the folder that holds the runs"):
        list_runs(tmp_path / "nowhere")


def test_the_command_prints_json(tmp_path: Path) -> None:
    make_run(tmp_path, "a", step(0.25))
    command = [sys.executable, "-m", "align", "runs", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (run,) = json.loads(done.stdout)
    assert (run["name"], run["state"], run["step"], run["score"]) == ("a", "stopped", 1, 0.25)


def test_the_folder_of_the_command_is_runs_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("runs", "a"), ("others", "b")):
        make_run(tmp_path / folder, name, step(0.25))
    monkeypatch.chdir(tmp_path)
    for arguments, name in ((["runs"], "a"), (["runs", "others"], "b")):
        typer.main.get_command(app)([*arguments, "--json"], standalone_mode=False)
        assert [run["name"] for run in json.loads(capsys.readouterr().out)] == [name]
