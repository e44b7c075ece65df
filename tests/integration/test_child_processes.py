"""Runs with functions of the user's that misbehave: they end with one message, or go on, and leave no process."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from align import open_run
from tests.integration.conftest import Command
from tests.integration.tiny_run import COMMAND, ENVIRONMENT, figures, run_a_step_at_a_time, run_in_process, write_rows

MISDEEDS = """
import os, signal, sys, time

def hang():
    while True: pass

def fork_and_hang():
    os.fork()
    time.sleep(600)

def leave_a_daemon():
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)

def eat():
    eaten = []
    while True: eaten.append(bytes(10**7))

def leave():
    sys.exit(3)

def chatter():
    for _ in range(10_000): print("chatter " * 20)

def alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(600)

def good():
    pass

def score(prompts, responses, columns):
    for row in columns:
        globals()[row["does"]]()
    return [float(len(response)) for response in responses]
"""
FAIL = ("hang", "fork_and_hang", "eat", "leave", "alarm")
SUCCEED = ("leave_a_daemon", "chatter", "good")


@pytest.fixture
def processes_of(tmp_path: Path) -> Iterator[Path]:
    """The test's folder; at the end of the test, no process may have its path in its command."""
    yield tmp_path
    end = time.monotonic() + 10
    while (left := _processes_that_name(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def _processes_that_name(folder: Path) -> list[list[str]]:
    left: list[list[str]] = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["pid"] != os.getpid() and str(folder) in " ".join(command):
            left.append(command)
    return left


def write_run(settings: dict[str, Any], folder: Path, deeds: tuple[str, ...], **term: Any) -> Path:
    """An experiment of two PPO steps, where the function does what a column says."""
    (folder / "score.py").write_text(MISDEEDS)
    rows = [{"prompt": f"User: {i} Assistant:", "does": deeds[i % len(deeds)]} for i in range(8)]
    held_out = [{"prompt": "User: hello Assistant:", "does": "good"}]
    settings["data"] = {
        "prompts": write_rows(folder / "prompts.jsonl", rows),
        "prompts_heldout": write_rows(folder / "held_out.jsonl", held_out),
    }
    settings["stages"] = ["ppo"]
    own = {"kind": "function", "function": f"{folder}/score.py:score", "timeout": 1.5, "memory_gb": 0.5}
    settings["reward"] = {"terms": {"own": own | term}}
    settings["ppo"] |= {"steps": 2}
    settings["evaluation"] = {"prompts": 1}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_a_run_with_a_fallback_goes_on_whatever_a_function_does(
    settings: dict[str, Any], processes_of: Path, align: Command
) -> None:
    path = write_run(settings, processes_of, FAIL + SUCCEED, fallback=-1)
    done = align("run", path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("such responses get the fallback, -1, and are counted in reward/failed/own") == 1
    steps = [row for row in figures(processes_of / "runs" / "tiny") if "policy/loss" in row]
    assert [row["reward/failed/own"] for row in steps] == [len(FAIL) / 8] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "reason"),
    [("fork_and_hang", "took longer than 1.5 s"), ("leave", "raised SystemExit: 3"), ("alarm", "SIGALRM")],
)
def test_a_run_without_a_fallback_ends_with_one_message(
    settings: dict[str, Any], processes_of: Path, align: Command, deed: str, reason: str
) -> None:
    done = align("run", write_run(settings, processes_of, ("leave_a_daemon", deed)))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert message.startswith(f"error: reward.terms.own.function: {processes_of}/score.py:score ")
    assert reason in message


def test_a_function_dies_with_its_run(settings: dict[str, Any], processes_of: Path) -> None:
    path = write_run(settings, processes_of, ("leave_a_daemon", "fork_and_hang"), timeout=600)
    run = subprocess.Popen([*COMMAND, "run", str(path)], cwd=processes_of, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while len(_processes_that_name(processes_of)) < 4 and time.monotonic() < end:
        time.sleep(0.1)
    assert len(_processes_that_name(processes_of)) >= 4  # the run, a keeper, a worker and what it has forked
    run.send_signal(signal.SIGKILL)
    run.wait()


IN_PROCESS = """
from multiprocessing import Pool

import rewards.terms.number  # not the file rewards.py that is beside this one
from helper_of_the_estimator import double


def estimate(batch):
    with Pool(2) as pool:
        totals = pool.map(double, [float(rewards.sum()) for rewards in batch.rewards])
    return [0 * rewards + total for rewards, total in zip(batch.rewards, totals)], batch.values


def leave(batch):
    raise SystemExit(3)
"""


def write_estimator(settings: dict[str, Any], folder: Path, name: str) -> Path:
    (folder / "estimator.py").write_text(IN_PROCESS)
    (folder / "helper_of_the_estimator.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "rewards.py").write_text("1 / 0\n")
    path = write_run(settings, folder, ("good",))
    settings["ppo"] |= {"estimator": f"{folder}/estimator.py:{name}"}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_an_estimator_may_fork_and_import_what_is_beside_it(
    settings: dict[str, Any], processes_of: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_estimator(settings, processes_of, "estimate")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    line = [*COMMAND, "run", str(path)]
    done = subprocess.run(line, cwd=elsewhere, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_estimator_that_exits_is_named(
    settings: dict[str, Any], processes_of: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_estimator(settings, processes_of, "leave")
    line = [*COMMAND, "run", str(path)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(line, cwd=elsewhere, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 2, done.stderr
    file = f"{processes_of}/estimator.py"
    assert f"error: ppo.estimator: {file}:leave raised SystemExit: 3 ({file}:15)" in done.stderr


def test_a_run_with_functions_resumes_exactly(settings: dict[str, Any], processes_of: Path) -> None:
    (processes_of / "gold.py").write_text("def gold(p, r, c): return [float(x.count('e')) for x in r]\n")
    write_run(settings, processes_of, ("good",), processes=2)
    settings["ppo"] |= {"steps": 3}
    settings["evaluation"] |= {"gold": f"{processes_of}/gold.py:gold", "every": 1}
    uninterrupted = run_in_process(settings | {"name": "uninterrupted"})
    resumed = run_a_step_at_a_time(settings | {"name": "resumed"})
    assert figures(resumed) == figures(uninterrupted)
    evaluations = [json.loads((run / "policy" / "evaluation.json").read_text()) for run in (resumed, uninterrupted)]
    assert evaluations[0] == evaluations[1]


def test_a_trained_run_scores_by_functions_until_it_is_gone(settings: dict[str, Any], processes_of: Path) -> None:
    write_run(settings, processes_of, ("good",))
    trained = open_run(run_in_process(settings))
    assert trained.score(["a", "b"], ["one", "three"], [{"does": "good"}] * 2) == [3.0, 5.0]
    assert len(_processes_that_name(processes_of)) == 2
    del trained
