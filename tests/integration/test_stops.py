"""Runs that are stopped or killed in the middle of a long step, by real signals, and resumed."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.kill_sweep import contents
from tests.integration.test_kills import Runs, children
from tests.integration.tiny_run import figures

SLOW_CALL = 3
"""The call of the reward function that takes long: that of the third step."""

REWARD = """
import time
from pathlib import Path

FOLDER = Path(__file__).parent

def shortness(prompts, responses, columns):
    if (FOLDER / "slow").exists():
        with (FOLDER / "calls").open("a") as calls:
            calls.write(".")
        if (FOLDER / "calls").stat().st_size == SLOW_CALL:
            (FOLDER / "calling").touch()
            time.sleep(SECONDS)
    return [-float(len(response)) for response in responses]
"""


@pytest.fixture
def slow_settings(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Four steps of PPO; where a file `slow` exists, the scoring of the third never ends."""
    write_reward(tmp_path, 3600)
    settings["stages"] = ["ppo"]
    settings["reward"] = {"terms": {"short": term(tmp_path)}}
    settings["ppo"]["steps"] = 4
    settings["evaluation"]["every"] = 0
    settings["checkpoint"] = {"every": 100}
    return settings


def write_reward(folder: Path, seconds: float) -> None:
    text = REWARD.replace("SLOW_CALL", str(SLOW_CALL)).replace("SECONDS", str(seconds))
    (folder / "reward.py").write_text(text)


def term(folder: Path) -> dict[str, Any]:
    function = f"{folder / 'reward.py'}:shortness"
    return {"kind": "function", "function": function, "normalise": "running", "timeout": 3600}


@pytest.fixture
def runs(slow_settings: dict[str, Any], tmp_path: Path) -> Iterator[Runs]:
    started_runs = Runs(slow_settings, tmp_path)
    yield started_runs
    for process in started_runs.started:
        process.kill()


def wait_for(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not is_true():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)


def start_until_slow(runs: Runs) -> subprocess.Popen[str]:
    """Start a run, and wait until the scoring of its third step is under way."""
    (runs.folder / "slow").touch()
    process = runs.start("hurt")
    wait_for((runs.folder / "calling").exists, process)
    return process


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints" / "ppo").glob("step-*"))


def finish_like(runs: Runs, whole: Path) -> None:
    """Resume the run, which ends as the undisturbed one."""
    (runs.folder / "slow").unlink(missing_ok=True)
    run = runs.finish("hurt")
    assert figures(run) == figures(whole)
    for name in ("samples.jsonl", "policy/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert contents(run / "checkpoints/ppo/step-4") == contents(whole / "checkpoints/ppo/step-4")


LAYOUTS: dict[str, dict[str, Any]] = {
    "here": {},
    "actors": {"rollouts": {"workers": 1, "chunk_size": 8}, "learner": {"ranks": 1}},
    "asynchronous": {
        "rollouts": {"workers": 1, "chunk_size": 8, "max_staleness": 1},
        "ppo": {"importance_ratio_cap": 2.0},
    },
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, slow_settings: dict[str, Any]) -> str:
    name: str = request.param
    for section, changed in LAYOUTS[name].items():
        slow_settings[section] |= changed
    return name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_while_a_step_is_scored_saves_the_step_before(layout: str, runs: Runs) -> None:
    whole = runs.finish("whole")
    assert saved(whole) == ["step-4"]
    process = start_until_slow(runs)
    process.send_signal(signal.SIGINT if layout == "asynchronous" else signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "stopping without the rollouts of this step" in errors
    assert "Traceback" not in errors
    assert saved(runs.path("hurt")) == ["step-2"]
    finish_like(runs, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_in_a_long_step_loses_that_step_where_the_minutes_have_passed(layout: str, runs: Runs) -> None:
    whole = runs.finish("whole")
    runs.settings["checkpoint"] |= {"minutes": 1e-6, "keep": 9}
    process = start_until_slow(runs)
    process.kill()
    process.communicate(timeout=100)
    assert saved(runs.path("hurt")) == ["step-1", "step-2"]
    finish_like(runs, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stop_in_rollouts_that_take_twenty_seconds_does_not_wait_for_them(
    slow_settings: dict[str, Any], runs: Runs
) -> None:
    slow_settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
    whole = runs.finish("whole")
    write_reward(runs.folder, 0)
    process = runs.start("hurt")
    runs.until_logged("policy/loss", process, "hurt")
    (worker,) = children(process, "ray::Worker")
    worker.suspend()  # a slow engine
    time.sleep(20)
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert len(saved(runs.path("hurt"))) == 1
    finish_like(runs, whole)


def stop_a_rank(slow_settings: dict[str, Any], runs: Runs) -> subprocess.Popen[str]:
    """Start a run, suspend its learner's rank, and send a signal that cannot end the step."""
    slow_settings["learner"] |= {"ranks": 1}
    process = runs.start("hurt")
    runs.until_logged("policy/loss", process, "hurt")
    (rank,) = children(process, "ray::_Rank")
    rank.suspend()
    time.sleep(1)  # whatever the rank has just done reaches the controller, which then waits for it
    process.terminate()
    return process


def assert_ended(process: subprocess.Popen[str]) -> str:
    """The run has ended, and its processes with it. Gives what it wrote."""
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    return " ".join(errors.split())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_signal_ends_a_run_that_waits_for_ray(slow_settings: dict[str, Any], runs: Runs) -> None:
    slow_settings["checkpoint"] = {"every": 1}
    process = stop_a_rank(slow_settings, runs)
    assert process.stderr
    while "repeat to stop at once" not in process.stderr.readline():
        assert process.poll() is None
    process.terminate()
    assert_ended(process)
    assert runs.finish("hurt")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_ends_when_the_grace_period_is_over(slow_settings: dict[str, Any], runs: Runs) -> None:
    slow_settings["checkpoint"] = {"every": 1, "grace": 2}
    process = stop_a_rank(slow_settings, runs)
    errors = assert_ended(process)
    assert "checkpoint.grace has passed: the run ends with the last checkpoint" in errors
    assert f"`align resume {runs.path('hurt')}`" in errors
    assert runs.finish("hurt")
