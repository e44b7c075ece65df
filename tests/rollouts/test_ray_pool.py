"""Real workers, killed, stopped and deceived for real."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch

from align.config.schema import ClusterSettings
from align.resources.ray_cluster import ray_cluster
from policies.device import ComputeSettings
from policies.errors import UserError
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import AsyncRollouts, PartialRollouts
from rollouts.build import build_engine
from rollouts.engine import Engine, Sampling
from rollouts.pool import LocalPool
from rollouts.ray_pool import RayPool
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request, Trajectory
from rollouts.transformers_engine import SAMPLER_ROLE

POLICY = PolicySettings(rank=4, alpha=8)
ROLLOUTS = RolloutSettings(max_num_seqs=4, chunk_size=8)
REQUESTS = [Request("x", (5 + i % 40, 6, 7), i) for i in range(64)]
SAMPLING = Sampling(1.0, 32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterSettings(), 6):
        yield


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> LocalPool:
    return LocalPool(build_engine(ModelSettings(path=str(tiny_model)), POLICY, ROLLOUTS), 8)


@pytest.fixture(scope="module")
def versions(tiny_model: Path) -> list[AdapterWeights]:
    """Adapters that differ."""
    first = build_trunk(ModelSettings(path=str(tiny_model)), POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    return [{name: tensor + 0.02 * version for name, tensor in first.items()} for version in range(6)]


@pytest.fixture(scope="module")
def pool(tiny_model: Path, cluster: None) -> Iterator[RayPool]:
    """One for all tests that leave it whole."""
    made = pool_of(tiny_model)
    yield made
    made.close()


def pool_of(model: Path, workers: int = 2, timeout: float = 60.0, straggler_factor: float = 4.0) -> RayPool:
    build = partial(build_engine, ModelSettings(path=str(model)), POLICY, ROLLOUTS)
    return RayPool(build, workers, 8, timeout, straggler_factor, ComputeSettings(1, deterministic=True), 0.0)


def processes() -> list[psutil.Process]:
    """The workers of all pools, the newest last."""
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Worker")]


def tokens(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [trajectory.response_ids for trajectory in trajectories]


def answers(local: LocalPool, version: int, weights: AdapterWeights) -> list[tuple[int, ...]]:
    local.load_adapter(version, weights)
    return tokens(local.generate(REQUESTS, SAMPLING))


def test_workers_give_the_same_responses_as_this_process(
    pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    for version in (1, 2):
        pool.load_adapter(version, versions[version])
        trajectories = pool.generate(REQUESTS, SAMPLING)
        assert tokens(trajectories) == answers(local, version, versions[version])
        assert [t.request for t in trajectories] == REQUESTS
        assert {v for t in trajectories for v in t.versions} == {version}


@pytest.mark.slow
def test_one_worker_gives_the_same_too(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    alone = pool_of(tiny_model, 1)
    alone.load_adapter(1, versions[1])
    assert tokens(alone.generate(REQUESTS, SAMPLING)) == answers(local, 1, versions[1])
    alone.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments_change_nothing(
    kills: int, pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    moments = random.Random(0)
    pool.load_adapter(0, versions[0])
    pool.wait()
    for kill in range(kills):
        version = kill % len(versions)
        victim = moments.choice(processes())
        threading.Timer(moments.uniform(0.0, 0.3), victim.kill).start()
        pool.load_adapter(version, versions[version])
        trajectories = pool.generate(REQUESTS, SAMPLING)
        assert tokens(trajectories) == answers(local, version, versions[version])
        assert {v for t in trajectories for v in t.versions} == {version}
        victim.wait(10)


@pytest.mark.slow
def test_a_worker_that_hangs_holds_nothing_up(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    pool = pool_of(tiny_model, timeout=15.0)
    pool.load_adapter(0, versions[0])
    pool.wait()
    pool.generate(REQUESTS, SAMPLING)  # so that it is known what a chunk takes
    victim = processes()[-1]
    threading.Timer(0.05, victim.suspend).start()
    for version in (1, 2):
        pool.load_adapter(version, versions[version])
        assert tokens(pool.generate(REQUESTS, SAMPLING)) == answers(local, version, versions[version])
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:  # given up after its 15 seconds
        pool.generate(REQUESTS[:8], SAMPLING)
        time.sleep(0.5)
    pool.wait()
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == answers(local, 2, versions[2])
    pool.close()


class Forgetful:
    """An engine that keeps its old adapter once, when it first finds no such file, and says which it holds."""

    def __init__(self, engine: Engine, mark: Path) -> None:
        self.engine, self.mark, self.held = engine, mark, ""

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        if version == 2 and not self.mark.exists():
            self.mark.touch()
            return self.held
        self.held = self.engine.load_adapter(version, weights)
        return self.held

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return self.engine.generate(requests, sampling)


def build_forgetful(model: Path, mark: Path) -> Engine:
    return Forgetful(build_engine(ModelSettings(path=str(model)), POLICY, ROLLOUTS), mark)


@pytest.mark.slow
def test_a_worker_with_a_wrong_adapter_never_serves(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None, tmp_path: Path
) -> None:
    build = partial(build_forgetful, tiny_model, tmp_path / "forgot")
    pool = RayPool(build, 2, 8, 60.0, 4.0, ComputeSettings(1), 0.0)
    for version in (1, 2, 3):
        pool.load_adapter(version, versions[version])
        assert tokens(pool.generate(REQUESTS, SAMPLING)) == answers(local, version, versions[version])
    assert (tmp_path / "forgot").exists()
    pool.close()


def test_batches_asked_ahead_are_each_made_under_their_own_weights(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    pool = AsyncRollouts(pool_of(tiny_model))
    batches = [pool.submit(version, versions[version], REQUESTS, SAMPLING) for version in (1, 2)]
    pool.load_adapter(3, versions[3])  # takes its turn
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == answers(local, 3, versions[3])
    for version, batch in zip((1, 2), batches, strict=True):
        assert tokens(batch()) == answers(local, version, versions[version])
    unfinished = pool.submit(4, versions[4], REQUESTS, SAMPLING)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        unfinished()


def test_workers_compute_as_they_are_told(pool: RayPool) -> None:
    pool.wait()
    said = pool._manager.foreach_actor(
        lambda _: (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    )
    assert [result.get() for result in said] == [(1, True)] * 2


def test_responses_in_stretches_are_those_made_in_one_go(
    pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    pool.load_adapter(1, versions[1])
    trajectories = pool.generate(REQUESTS, replace(SAMPLING, segment_tokens=10))
    assert tokens(trajectories) == answers(local, 1, versions[1])
    assert [t.request for t in trajectories] == REQUESTS


def test_what_is_under_way_takes_up_newer_weights(pool: RayPool, versions: list[AdapterWeights]) -> None:
    pool.load_adapter(0, versions[0])
    pool.generate(REQUESTS[:8], SAMPLING)
    rollouts, before, stretched = PartialRollouts(pool), pool.roster.batch, replace(SAMPLING, segment_tokens=2)
    first = rollouts.submit(1, versions[1], REQUESTS, stretched)
    waiting = rollouts.submit(1, versions[1], REQUESTS, stretched)
    while pool.roster.batch == before or not pool.roster.answered:
        time.sleep(0.001)
    last = rollouts.submit(2, versions[2], REQUESTS, stretched)
    batches = [answered() for answered in (first, waiting, last)]
    assert any({*t.versions} == {1, 2} for t in batches[0])
    assert all(earlier <= later for t in batches[0] for earlier, later in pairwise(t.versions))
    assert {version for batch in batches[1:] for t in batch for version in t.versions} == {2}
    for batch in batches:
        assert [t.request for t in batch] == REQUESTS
        assert all(len(t.versions) == len(t.sampler_logprobs) == t.length for t in batch)
        assert all(t.ended or t.length == SAMPLING.max_new_tokens for t in batch)


def test_what_the_user_must_mend_is_said_at_once(pool: RayPool, versions: list[AdapterWeights]) -> None:
    pool.load_adapter(1, {name: tensor[:, :1] for name, tensor in versions[0].items()})
    with pytest.raises(UserError, match="another base, or other sizes"):
        pool.generate(REQUESTS[:8], SAMPLING)
