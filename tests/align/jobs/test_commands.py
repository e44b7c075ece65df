"""What `align submit` and `align jobs` say, and their exit status."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.cli import main
from align.jobs import commands
from align.jobs.client import Job
from align.jobs.submission import RunOfJob
from align.runtime.failures import ClusterLost


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Call the command `align`. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["align", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


class LostCluster:
    """The jobs, simulated, of a cluster that is lost once it has been asked for one of them."""

    def find(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(id=job_id, ended=False, status="RUNNING")

    def follow(self, job_id: str, output: object, note: object) -> None:
        raise ClusterLost("http://10.0.0.1:8265 has not answered for 60 s")

    def stop(self, job_id: str) -> None:
        raise ClusterLost("http://10.0.0.1:8265 has not answered for 60 s")


@pytest.mark.parametrize("command", ["logs", "stop"])
def test_a_lost_cluster_is_one_message(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_connect", lambda address: LostCluster())
    assert call(monkeypatch, "jobs", command, "x-1") == 1
    assert capsys.readouterr().err.endswith("error: http://10.0.0.1:8265 has not answered for 60 s\n")


class Ending(LostCluster):
    """The jobs, simulated, of a cluster where a job ends with a status when it is told to stop."""

    def __init__(self, status: str) -> None:
        self.status = status

    def stop(self, job_id: str) -> Any:
        return SimpleNamespace(id=job_id, status=self.status)

    def command(self, name: str, job_id: str) -> str:
        return f"align jobs {name} {job_id}"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("STOPPED", "job x-1 has stopped; `align jobs resume x-1` resumes its run"),
        ("SUCCEEDED", "job x-1 has ended by itself: succeeded"),
    ],
)
def test_how_a_job_that_was_told_to_stop_has_ended(
    status: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_connect", lambda address: Ending(status))
    monkeypatch.setattr(sys, "argv", ["align", "jobs", "stop", "x-1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().err.splitlines()[-1] == message


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An experiment in the current folder."""
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: base}\n")
    monkeypatch.chdir(tmp_path)
    return "x.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- pip\n", "expected fields of Ray's runtime environment, as `name: value`"),
        ("1: x\n", "expected fields of Ray's runtime environment, as `name: value`"),
        ("working_dir: .\n", "working_dir: the current folder is sent; remove this field"),
        ("env_vars: [A]\n", "runtime_env['env_vars'] must be of type Dict[str, str], got <class 'list'>"),
        ("env_vars: A=1\n", "runtime_env['env_vars'] must be of type Dict[str, str], got <class 'str'>"),
        (
            "env_vars: {A: 1}\n",
            "runtime_env['env_vars'] must be of type Dict[str, str], but the value 1 is of type <class 'int'>",
        ),
        ("pip: 5\n", "runtime_env['pip'] must be of type str or List[str], got <class 'int'>"),
    ],
)
def test_a_wrong_file_of_the_runtime_environment_is_refused(
    text: str, message: str, experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("env.yaml").write_text(text)
    assert call(monkeypatch, "submit", experiment, "--runtime-env", "env.yaml", "--dry-run") == 2
    assert capsys.readouterr().err == f"error: --runtime-env env.yaml: {message}\n"


def test_the_values_of_a_runtime_environment_reach_the_job_and_are_not_shown(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("env.yaml").write_text("env_vars: {KEY: secret}\npip: [x]\n")
    monkeypatch.setattr(sys, "argv", ["align", "submit", experiment, "--runtime-env", "env.yaml", "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    shown = capsys.readouterr().out
    assert "KEY: …" in shown
    assert "pip:\n  - x" in shown
    assert "secret" not in shown


def test_a_field_that_ray_does_not_have_is_told(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("env.yaml").write_text("pip: [six]\nenv_var: {A: '1'}\n")
    assert not call(monkeypatch, "submit", experiment, "--runtime-env", "env.yaml", "--dry-run")
    said = capsys.readouterr().err
    assert "--runtime-env env.yaml: env_var is not a field of Ray's; it needs a plugin on the cluster" in said
    assert "pip is not" not in said


@pytest.mark.parametrize("text", ["env_vars: {A: [1\n", None])
def test_a_file_of_the_runtime_environment_that_cannot_be_read_is_refused(
    text: str | None, experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path("env.yaml").write_text(text)
    assert call(monkeypatch, "submit", experiment, "--runtime-env", "env.yaml", "--dry-run") == 2
    assert capsys.readouterr().err.startswith("error: --runtime-env env.yaml cannot be read: ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("=1", "--env =1: expected NAME or NAME=VALUE"),
        ("MISSING", "--env MISSING: this environment variable is not set: set it, or give --env MISSING=VALUE"),
    ],
)
def test_a_wrong_environment_variable_is_refused(
    given: str, message: str, experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MISSING", raising=False)
    assert call(monkeypatch, "submit", experiment, "--env", given, "--dry-run") == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_experiment_file_comes_before_the_settings(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "submit", "seed=1", experiment, "--dry-run") == 2
    assert "seed=1: the experiment file comes first, then the settings as KEY=VALUE" in capsys.readouterr().err


class Listing:
    """The jobs, simulated, of a cluster with one that has failed."""

    def list(self) -> list[Job]:
        run = RunOfJob("/shared/[red]/quick", "python", [], 1, 0)
        started = datetime(2026, 11, 29, 12, 30, tzinfo=UTC)
        return [Job("quick-1", run, "FAILED", 2, "exit code 2", started, 3725.0, {})]


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_jobs_are_listed_for_people_and_for_programs(
    option: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_connect", lambda address: Listing())
    assert not call(monkeypatch, "jobs", "list", *option)
    said = capsys.readouterr().out
    if option:
        assert json.loads(said) == [
            {
                "id": "quick-1",
                "state": "failed",
                "exit_status": 2,
                "message": "exit code 2",
                "submitted": "2026-11-29T12:30:00+00:00",
                "seconds": 3725.0,
                "run": "/shared/[red]/quick",
            }
        ]
    else:
        assert said.splitlines()[1].split() == [
            "quick-1",
            "failed",
            "(2)",
            "11-29",
            "12:30",
            "1:02:05",
            "/shared/[red]/quick",
        ]
