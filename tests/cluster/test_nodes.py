"""Runs on two machines, the second of which fails or lacks something."""

import shutil
import time
from typing import Any

import pytest

from tests.cluster.conftest import CPUS, Cluster, Record
from tests.cluster.runs import Run, last_line, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LOSSES = {"sft": "sft/loss", "reward": "reward_model/loss", "ppo": "policy/loss"}


def settings_of(cluster: Cluster, name: str, stage: str) -> dict[str, Any]:
    """An experiment of one stage, which needs no other."""
    settings = cluster.settings(name, stage)
    if stage == "ppo":
        settings["reward"] = {"terms": {"short": {"kind": "length", "max_tokens": 4, "window": 4}}}
        settings["rollouts"]["chunk_size"] = 2
        settings["ppo"] |= {"steps": 8}
    return settings


def test_too_few_cpus(cluster: Cluster, record: Record) -> None:
    settings = settings_of(cluster, "cpus", "sft")
    settings["learner"]["ranks"] = 2 * CPUS + 1
    since = time.monotonic()
    run = Run(cluster.first, settings)
    assert run.end() == 2
    message = last_line(run.message)
    assert message.startswith("error: cluster.wait: for 30 s the cluster has had no room for 9 learner ranks")
    assert "10.77.0.1 (4 CPUs" in message
    assert "10.77.0.2 (4 CPUs" in message
    assert not (run.folder / "checkpoints").exists()
    record(f"{2 * CPUS + 1} ranks where there are {2 * CPUS} CPUs", "refused, status 2", since, message)


def test_a_folder_that_the_second_machine_lacks(cluster: Cluster, record: Record) -> None:
    model = cluster.work / "model"
    shutil.copytree(cluster.model, model)
    settings = settings_of(cluster, "folder", "sft")
    settings["model"]["path"] = str(model)
    settings["learner"] |= {"ranks": 2, "strategy": "STRICT_SPREAD"}
    since = time.monotonic()
    run = Run(cluster.first, settings)
    assert run.end() == 2
    message = last_line(run.message)
    assert message.startswith(f"error: model.path: no {model} on node {cluster.second.address}: learner ranks read it ")
    assert not (run.folder / "checkpoints").exists()
    record("a model that the second machine lacks", "refused, status 2", since, message)


def test_a_folder_that_only_the_machine_of_the_actors_has_to_have(cluster: Cluster) -> None:
    model = cluster.work / "own-model"
    shutil.copytree(cluster.model, model)
    settings = settings_of(cluster, "own-folder", "sft")
    settings["model"]["path"] = str(model)
    settings["sft"]["epochs"] = 1
    settings["learner"] |= {"ranks": 1, "resources": {"first": 1}}
    run = Run(cluster.first, settings)
    assert run.end() == 0, run.message


@pytest.mark.parametrize("stage", LOSSES)
def test_a_killed_machine_with_a_rank(stage: str, whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, f"rank-{stage}", stage)
    settings["learner"] |= {"ranks": 2, "zero": 2, "strategy": "SPREAD"}
    run = Run(whole.first, settings)
    run.until_logged(LOSSES[stage])
    assert whole.second.processes("ray::_Rank")
    whole.second.end()
    since = time.monotonic()
    run.until_said("resuming from the last checkpoint")
    record(f"a machine with a rank killed, {stage}", "resumes on the other, status 0", since, last_line(run.message))
    assert run.end() == 0, run.message
    assert until(lambda: not run.actors())


def test_a_killed_machine_with_a_rank_that_cannot_be_elsewhere(whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, "strict", "sft")
    settings["learner"] |= {"ranks": 2, "zero": 2, "strategy": "STRICT_SPREAD"}
    run = Run(whole.first, settings)
    run.until_logged("sft/loss")
    whole.second.end()
    since = time.monotonic()
    assert run.end() == 2
    message = last_line(run.message)
    assert message.startswith("error: cluster.wait: for 30 s the cluster has had no room for 2 learner ranks")
    assert until(lambda: not run.actors())
    scenario = "a machine with a rank killed, with `learner.strategy: STRICT_SPREAD`"
    record(scenario, "ends, status 2", since, message)


def test_a_killed_machine_with_a_worker(whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, "worker", "ppo")
    settings["learner"] |= {"ranks": 1, "resources": {"first": 1}}
    settings["rollouts"] |= {"workers": 2}
    run = Run(whole.first, settings)
    run.until_logged("policy/loss")
    assert whole.second.processes("ray::Worker")
    assert not whole.second.processes("ray::_Rank")
    whole.second.end()
    since = time.monotonic()
    assert run.end() == 0, run.message
    assert "Traceback" not in run.message
    record("a machine with one of two workers killed", "goes on, status 0", since)


def test_a_killed_machine_with_the_only_worker_that_cannot_be_elsewhere(whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, "pinned", "ppo")
    settings["rollouts"] |= {"workers": 1, "resources": {"second": 1}}
    run = Run(whole.first, settings)
    run.until_logged("policy/loss")
    whole.second.end()
    since = time.monotonic()
    assert run.end() == 2, run.message
    message = last_line(run.message)
    assert message.startswith("error: cluster.wait: for 30 s the cluster has had no room for 1 rollout worker")
    record("the only machine that may have the worker killed", "ends, status 2", since, message)


def test_a_link_to_a_rank_that_is_down(whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, "link-rank", "sft")
    settings["learner"] |= {"ranks": 2, "zero": 2, "strategy": "SPREAD"}
    run = Run(whole.first, settings)
    run.until_logged("sft/loss")
    assert whole.second.processes("ray::_Rank")
    whole.second.set_link("down")
    since = time.monotonic()
    run.until_said("resuming from the last checkpoint")
    record("the link to a machine with a rank down", "resumes on the other, status 0", since, last_line(run.message))
    assert run.end() == 0, run.message
    assert until(lambda: not run.actors())


def test_a_link_to_a_worker_that_is_down(whole: Cluster, record: Record) -> None:
    settings = settings_of(whole, "link-worker", "ppo")
    settings["rollouts"] |= {"workers": 2}
    run = Run(whole.first, settings)
    run.until_logged("policy/loss")
    assert whole.second.processes("ray::Worker")
    whole.second.set_link("down")
    since = time.monotonic()
    assert run.end() == 0, run.message
    record("the link to a machine with one of two workers down", "goes on, status 0", since)
    assert until(lambda: not run.actors())
