"""Runs that are killed at their writes, one after the other, and resumed: every file as without the kill."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.kill_sweep import NAME, Sweep, WarmProcess, build_library

PROCESSES = min(2, os.cpu_count() or 1)
"""Attempts at the same time."""
OF_THIRTY = slice(4, None, 31)
"""One operation of about thirty, for `make test`; a prime, so that no kind of operation is always left out."""
OF_SIX = slice(0, None, 6)
"""One of six: with Ray, each attempt starts two clusters."""


StartProcess = Callable[[], WarmProcess]


@pytest.fixture
def start_process(tmp_path: Path) -> Iterator[StartProcess]:
    library = build_library(tmp_path)
    started = []

    def start() -> WarmProcess:
        started.append(WarmProcess(library))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Two steps of each stage, which write everything that a run can write, and remove some of it."""
    settings["sft"] = {"batch_size": 18, "checkpoint_every": 1, "evaluate_every": 1}
    settings["reward"] = {"batch_size": 18, "checkpoint_every": 1, "normalise": 8}
    settings["ppo"] |= {"steps": 2, "batch_size": 4, "epochs": 1}
    settings["checkpoint"] = {"every": 1, "keep": 1}
    return settings


def kill_at(sweeps: list[Sweep], operations: slice) -> None:
    """Kill at these operations, divided among the sweeps, and fail with all that went wrong."""
    numbers = range(1, len(sweeps[0].operations) + 1)[operations]
    share = -(-len(numbers) // len(sweeps))
    with ThreadPoolExecutor(len(sweeps)) as threads:
        jobs = []
        for index, sweep in enumerate(sweeps):
            # Neighbours stay together, because many of them leave the same files.
            jobs.append(threads.submit(sweep.kill_at_each, numbers[index * share : (index + 1) * share]))
        for job in jobs:
            job.result()
    kills = sum(sweep.kills for sweep in sweeps)
    failures: list[str] = []
    for sweep in sweeps:
        failures += sweep.failures
    print(f"{len(sweeps[0].operations)} operations, {kills} kills, {len(failures)} failures")
    assert kills == len(numbers)
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_some_writes_resumes_to_the_same_files(
    small: dict[str, Any], tmp_path: Path, start_process: StartProcess
) -> None:
    kill_at([Sweep(small, tmp_path / "sweep", start_process())], OF_THIRTY)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_killed_at_any_write_resumes_to_the_same_files(
    small: dict[str, Any], tmp_path: Path, start_process: StartProcess
) -> None:
    sweeps = [Sweep(small, tmp_path / str(number), start_process()) for number in range(PROCESSES)]
    kill_at(sweeps, slice(None))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_run_with_a_worker_and_a_rank_killed_at_writes_of_ppo_resumes_to_the_same_files(
    small: dict[str, Any], tmp_path: Path, start_process: StartProcess
) -> None:
    """SFT and the reward model are trained in process: every attempt starts after them."""
    for stage in ("sft", "reward"):
        small[stage]["ranks"] = 0
    small["rollouts"]["workers"] = 1
    small["learner"]["ranks"] = 1
    process = start_process()
    start = until_ppo(Sweep(small, tmp_path / "whole", process), tmp_path / "start")
    kill_at([Sweep(small, tmp_path / "sweep", process, start)], OF_SIX)


def until_ppo(sweep: Sweep, folder: Path) -> Path:
    """A run that was killed when the reward model was complete. Returns its folder."""
    complete = next(number for number, line in enumerate(sweep.operations) if line.endswith("rename /reward"))
    attempt = sweep.new_attempt("until PPO")
    assert sweep.run(attempt, kill_at=complete + 3) == -signal.SIGKILL
    shutil.move(attempt / "runs" / NAME, folder)
    return folder
