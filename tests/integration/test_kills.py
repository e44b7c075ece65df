"""Runs that are killed for real and resumed: bit for bit what they would have been."""

import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.integration.tiny_run import COMMAND, ENVIRONMENT, figures

KILLS = 20


@pytest.fixture(params=[(0, 0), (1, 0), (2, 2)], ids=["here", "one rank", "two ranks, ZeRO 2"])
def split(request: pytest.FixtureRequest, settings: dict[str, Any]) -> dict[str, Any]:
    ranks, zero = request.param
    settings["learner"] |= {"ranks": ranks, "zero": zero}
    return settings


class Runs:
    """Starts the command in separate processes, which all end with the test."""

    def __init__(self, settings: dict[str, Any], folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.started: list[subprocess.Popen[str]] = []

    def line(self, name: str) -> tuple[str, ...]:
        """The arguments that start the run of this name, or resume it."""
        if (self.path(name) / "config.yaml").exists():
            return ("resume", str(self.path(name)))
        experiment = self.folder / f"{name}.yaml"
        experiment.write_text(yaml.safe_dump(self.settings | {"name": name}))
        return ("run", str(experiment))

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, name: str) -> subprocess.Popen[str]:
        line = [*COMMAND, *self.line(name)]
        process = subprocess.Popen(
            line, cwd=self.folder, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.started.append(process)
        return process

    def finish(self, name: str) -> Path:
        process = self.start(name)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return self.path(name)

    def until_logged(self, metric: str, process: subprocess.Popen[str], name: str) -> None:
        metrics = self.path(name) / "metrics.jsonl"
        while not (metrics.exists() and f'"{metric}"' in metrics.read_text()):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)


@pytest.fixture
def runs(settings: dict[str, Any], tmp_path: Path) -> Iterator[Runs]:
    started_runs = Runs(settings, tmp_path)
    yield started_runs
    for process in started_runs.started:
        process.kill()


def same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    for weights in ("sft", "reward", "policy"):
        name = "adapter_model.safetensors"
        assert (run / weights / name).read_bytes() == (other / weights / name).read_bytes()


def children(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if name in p.name()]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_at_random_moments_change_nothing(split: dict[str, Any], runs: Runs) -> None:
    start = time.monotonic()
    whole = runs.finish("whole")
    seconds, moments, kills = time.monotonic() - start, random.Random(0), 0
    for attempt in range(KILLS):
        name, finished = f"killed-{attempt}", False
        while not finished:
            process, began = runs.start(name), time.monotonic()
            # Every other kill as soon as something is being written.
            deadline, writing = began + moments.uniform(0.3, 1.0) * seconds, kills % 2 == 1
            while process.poll() is None and kills < KILLS:
                if time.monotonic() > deadline and (not writing or any(runs.path(name).rglob(".*.writing"))):
                    process.kill()
                    kills += 1
                    break
                time.sleep(0.001)
            _, errors = process.communicate(timeout=300)
            assert process.returncode in (0, -signal.SIGKILL), errors
            finished = process.returncode == 0
        seconds = min(seconds, time.monotonic() - began)  # the machine may have had other work at first
        same(runs.path(name), whole)
        if kills == KILLS:
            return
    raise AssertionError(f"only {kills} kills")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("metric", ["sft/loss", "reward_model/loss", "policy/loss"])
def test_a_rank_that_dies_is_replaced_and_the_run_resumes_by_itself(
    metric: str, settings: dict[str, Any], runs: Runs
) -> None:
    settings["learner"] |= {"ranks": 2, "zero": 2}
    for stage in ("sft", "reward"):
        settings[stage] |= {"batch_size": 4, "epochs": 4, "checkpoint_every": 5}
    whole = runs.finish("whole")
    process = runs.start("hurt")
    runs.until_logged(metric, process, "hurt")
    children(process, "ray::_Rank")[-1].kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "of the learner has died" in errors
    same(runs.path("hurt"), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_may_die_more_often_than_restarts_says_where_checkpoints_lie_between(
    settings: dict[str, Any], runs: Runs
) -> None:
    settings["stages"] = ["sft"]
    settings["learner"] |= {"ranks": 1, "restarts": 1}
    settings["sft"] |= {"batch_size": 2, "epochs": 6, "checkpoint_every": 1}
    whole = runs.finish("whole")
    process = runs.start("hurt")
    for step in (5, 15, 25):
        checkpoint = runs.path("hurt") / "checkpoints" / "sft"
        while not any(int(path.name.removeprefix("step-")) >= step for path in checkpoint.glob("step-*")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        children(process, "ray::_Rank")[-1].kill()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors.count("further restarts allowed: 0") == 3
    assert figures(runs.path("hurt")) == figures(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stop", ["SIGTERM", "raylet"])
def test_a_run_that_is_stopped_or_loses_ray_says_so_and_can_be_resumed(
    stop: str, settings: dict[str, Any], runs: Runs
) -> None:
    settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
    settings["learner"]["ranks"] = 1
    whole = runs.finish("whole")
    process = runs.start("hurt")
    runs.until_logged("policy/loss", process, "hurt")
    if stop == "raylet":
        children(process, "raylet")[0].kill()
    else:
        process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (1 if stop == "raylet" else 130), errors
    assert "Traceback" not in errors
    assert f"align resume {runs.path('hurt')}" in " ".join(errors.split())
    same(runs.finish("hurt"), whole)


@pytest.mark.slow
@pytest.mark.skipif(psutil.Process().username() != "root", reason="mounts a file system")
def test_a_full_disk_is_reported_and_the_last_checkpoint_stays(
    settings: dict[str, Any], runs: Runs, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        process = runs.start("whole")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        runs.settings = settings | {"runs": str(small)}
        runs.path = lambda name: small / name  # type: ignore[method-assign]
        process = runs.start("full")
        _, errors = process.communicate(timeout=300)
        message = " ".join(errors.split())
        assert process.returncode == 1, errors
        assert "Traceback" not in errors
        assert re.search(r"No space left on device.*`align resume \S+` resumes from the last checkpoint", message), (
            message
        )
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        same(runs.finish("full"), tmp_path / "runs" / "whole")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_wrong_address_of_the_cluster_is_reported_before_anything_is_trained(
    settings: dict[str, Any], runs: Runs
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        settings["cluster"]["address"] = f"127.0.0.1:{unused.getsockname()[1]}"
        settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
        process = runs.start("whole")
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors
    assert f"cluster.address {settings['cluster']['address']} cannot be" in errors
    assert not (runs.path("whole") / "checkpoints").exists()
    assert not (runs.path("whole") / "sft").exists()
