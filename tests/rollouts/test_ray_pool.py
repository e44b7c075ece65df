"""Real Ray workers that are killed, suspended and made to use wrong weights."""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray
import torch

from align.config.schema import ClusterSettings
from align.resources.ray_cluster import ray_cluster
from policies.build import build_trunk
from policies.device import ActorOptions, ComputeSettings
from policies.errors import ActorError, UserError
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import AsyncRollouts, PartialRollouts
from rollouts.build import build_engine
from rollouts.engine import Engine, Sampling
from rollouts.pool import LocalPool
from rollouts.ray_pool import PoolSettings, RayPool
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
    """Adapters that differ from each other."""
    first = build_trunk(ModelSettings(path=str(tiny_model)), POLICY, (SAMPLER_ROLE,)).read_adapter(SAMPLER_ROLE)
    return [shifted(first, 0.02 * version) for version in range(6)]


@pytest.fixture(scope="module")
def pool(tiny_model: Path, cluster: None) -> Iterator[RayPool]:
    """One pool for all tests that leave it usable."""
    shared = make_pool(tiny_model)
    yield shared
    shared.close()


def make_pool(model: Path, workers: int = 2, timeout: float = 60.0) -> RayPool:
    build = partial(build_engine, ModelSettings(path=str(model)), POLICY, ROLLOUTS)
    settings = PoolSettings(chunk_size=8, timeout=timeout, straggler_factor=4.0)
    return RayPool(build, settings, [ActorOptions(ComputeSettings(1, deterministic=True))] * workers)


def shifted(weights: AdapterWeights, by: float) -> AdapterWeights:
    return {name: tensor + by for name, tensor in weights.items()}


def versions_of(trajectories: Sequence[Trajectory]) -> set[int]:
    """The versions of all tokens."""
    return set().union(*(trajectory.versions for trajectory in trajectories))


def processes() -> list[psutil.Process]:
    """The workers of all pools, the newest last."""
    return [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Worker")]


def tokens(trajectories: Sequence[Trajectory]) -> list[tuple[int, ...]]:
    return [trajectory.response_ids for trajectory in trajectories]


def expected_tokens(local: LocalPool, version: int, weights: AdapterWeights) -> list[tuple[int, ...]]:
    local.load_adapter(version, weights)
    return tokens(local.generate(REQUESTS, SAMPLING))


def test_workers_give_the_same_responses_as_this_process(
    pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    for version in (1, 2):
        pool.load_adapter(version, versions[version])
        trajectories = pool.generate(REQUESTS, SAMPLING)
        assert tokens(trajectories) == expected_tokens(local, version, versions[version])
        assert [t.request for t in trajectories] == REQUESTS
        assert versions_of(trajectories) == {version}


@pytest.mark.slow
def test_one_worker_gives_the_same_responses(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    single = make_pool(tiny_model, workers=1)
    single.load_adapter(1, versions[1])
    assert tokens(single.generate(REQUESTS, SAMPLING)) == expected_tokens(local, 1, versions[1])
    single.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_killed_at_random_moments_change_nothing(
    kills: int, pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    moments = random.Random(0)
    pool.load_adapter(0, versions[0])
    pool.wait()
    for kill in range(kills):
        version = kill % len(versions)
        if not processes():  # the kills have outrun the replacements
            pool.wait()
        victim = moments.choice(processes())
        threading.Timer(moments.uniform(0.0, 0.3), victim.kill).start()
        pool.load_adapter(version, versions[version])
        trajectories = pool.generate(REQUESTS, SAMPLING)
        assert tokens(trajectories) == expected_tokens(local, version, versions[version])
        assert versions_of(trajectories) == {version}
        victim.wait(10)


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_delay_the_batch(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    pool = make_pool(tiny_model, timeout=60.0)
    pool.load_adapter(0, versions[0])
    pool.wait()
    pool.generate(REQUESTS, SAMPLING)  # so that the duration of a chunk is known
    victim = processes()[-1]
    threading.Timer(0.05, victim.suspend).start()
    for version in (1, 2):
        pool.load_adapter(version, versions[version])
        assert tokens(pool.generate(REQUESTS, SAMPLING)) == expected_tokens(local, version, versions[version])
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:  # until it is given up after a minute
        pool.generate(REQUESTS[:8], SAMPLING)
        time.sleep(0.5)
    pool.wait()
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == expected_tokens(local, 2, versions[2])
    pool.close()


class Forgetful:
    """An engine that keeps its old adapter once, and reports it: when version 2 is loaded and the mark is missing."""

    def __init__(self, engine: Engine, mark: Path) -> None:
        self.engine = engine
        self.mark = mark
        self.loaded = ""

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        if version == 2 and not self.mark.exists():
            self.mark.touch()
            return self.loaded
        self.loaded = self.engine.load_adapter(version, weights)
        return self.loaded

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return self.engine.generate(requests, sampling)


def test_a_pool_for_whose_workers_there_is_no_room_ends(tiny_model: Path, cluster: None) -> None:
    def await_room() -> None:
        raise UserError("no room")

    build = partial(build_engine, ModelSettings(path=str(tiny_model)), POLICY, ROLLOUTS)
    settings = PoolSettings(chunk_size=8, timeout=60.0, straggler_factor=4.0)
    nowhere = ActorOptions(ComputeSettings(1), {"num_cpus": 1, "resources": {"nowhere": 1}})
    pool = RayPool(build, settings, [nowhere], await_room)
    with pytest.raises(UserError, match="no room"):
        pool.wait()
    pool.close()


@pytest.mark.slow
def test_a_pool_looks_for_room_only_while_no_worker_runs(
    tiny_model: Path, versions: list[AdapterWeights], cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rollouts.ray_pool.ROOM_SECONDS", 0.0)
    looked = []
    build = partial(build_engine, ModelSettings(path=str(tiny_model)), POLICY, ROLLOUTS)
    settings = PoolSettings(chunk_size=8, timeout=60.0, straggler_factor=4.0)
    pool = RayPool(build, settings, [ActorOptions(ComputeSettings(1))], lambda: looked.append("for room"))
    pool.load_adapter(1, versions[1])
    pool.wait()
    assert looked
    looked.clear()
    pool.generate(REQUESTS[:8], SAMPLING)
    assert not looked
    pool.close()


def build_forgetful(model: Path, mark: Path) -> Engine:
    return Forgetful(build_engine(ModelSettings(path=str(model)), POLICY, ROLLOUTS), mark)


@pytest.mark.slow
def test_a_worker_with_a_wrong_adapter_never_serves(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None, tmp_path: Path
) -> None:
    build = partial(build_forgetful, tiny_model, tmp_path / "forgot")
    settings = PoolSettings(chunk_size=8, timeout=60.0, straggler_factor=4.0)
    pool = RayPool(build, settings, [ActorOptions(ComputeSettings(1))] * 2)
    for version in (1, 2, 3):
        pool.load_adapter(version, versions[version])
        assert tokens(pool.generate(REQUESTS, SAMPLING)) == expected_tokens(local, version, versions[version])
    assert (tmp_path / "forgot").exists()
    pool.close()


@pytest.mark.slow
def test_queued_batches_are_each_generated_with_their_own_weights(
    tiny_model: Path, local: LocalPool, versions: list[AdapterWeights], cluster: None
) -> None:
    pool = AsyncRollouts(make_pool(tiny_model))
    batches = [pool.submit(version, versions[version], REQUESTS, SAMPLING) for version in (1, 2)]
    pool.load_adapter(3, versions[3])  # waits for both batches
    assert tokens(pool.generate(REQUESTS, SAMPLING)) == expected_tokens(local, 3, versions[3])
    for version, batch in zip((1, 2), batches, strict=True):
        assert tokens(batch()) == expected_tokens(local, version, versions[version])
    unfinished = pool.submit(4, versions[4], REQUESTS, SAMPLING)
    pool.close()
    with pytest.raises((RuntimeError, CancelledError)):  # aborted, or dropped before it was begun
        unfinished()


def test_workers_use_the_compute_settings(pool: RayPool) -> None:
    pool.wait()
    results = pool._manager.foreach_actor(
        lambda _: (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    )
    assert [result.get() for result in results] == [(1, True)] * 2


def test_responses_generated_in_segments_are_the_same(
    pool: RayPool, local: LocalPool, versions: list[AdapterWeights]
) -> None:
    pool.load_adapter(1, versions[1])
    trajectories = pool.generate(REQUESTS, replace(SAMPLING, segment_tokens=10))
    assert tokens(trajectories) == expected_tokens(local, 1, versions[1])
    assert [t.request for t in trajectories] == REQUESTS


def test_unfinished_and_queued_batches_continue_with_newer_weights(
    pool: RayPool, versions: list[AdapterWeights]
) -> None:
    pool.load_adapter(0, versions[0])
    pool.generate(REQUESTS[:8], SAMPLING)
    rollouts = PartialRollouts(pool)
    batch_before = pool.roster.batch
    segmented = replace(SAMPLING, segment_tokens=2)
    first = rollouts.submit(1, versions[1], REQUESTS, segmented)
    queued = rollouts.submit(1, versions[1], REQUESTS, segmented)
    while pool.roster.batch == batch_before or not pool.roster.completed:
        time.sleep(0.001)
    last = rollouts.submit(2, versions[2], REQUESTS, segmented)
    batches = [future() for future in (first, queued, last)]
    assert any({*t.versions} == {1, 2} for t in batches[0])
    assert all(t.versions == tuple(sorted(t.versions)) for t in batches[0])
    assert versions_of([*batches[1], *batches[2]]) == {2}
    for batch in batches:
        assert [t.request for t in batch] == REQUESTS
        assert all(len(t.versions) == len(t.sampler_logprobs) == t.length for t in batch)
        assert all(t.ended or t.length == SAMPLING.max_new_tokens for t in batch)


def test_an_error_for_the_user_to_fix_is_raised_at_once(pool: RayPool, versions: list[AdapterWeights]) -> None:
    pool.load_adapter(1, {name: tensor[:, :1] for name, tensor in versions[0].items()})
    with pytest.raises(UserError, match="another base, or other sizes") as caught:
        pool.generate(REQUESTS[:8], SAMPLING)
    assert type(caught.value) is UserError
    assert "ray::" not in str(caught.value)
    assert str(caught.value).endswith(f"(in a rollout worker on node {ray.util.get_node_ip_address()})")


@pytest.mark.slow
@pytest.mark.parametrize("cause", [UserError("no such model"), ValueError("seven\neight")])
def test_an_engine_that_cannot_be_built_is_reported_by_its_cause(cause: Exception, cluster: None) -> None:
    def build() -> Engine:
        raise cause

    settings = PoolSettings(chunk_size=8, timeout=60.0, straggler_factor=4.0)
    failing = RayPool(build, settings, [ActorOptions(ComputeSettings(1, deterministic=True))])
    try:
        failing.load_adapter(0, {"x": torch.zeros(1)})
        with pytest.raises((UserError, ActorError)) as caught:
            failing.generate(REQUESTS[:1], SAMPLING)
    finally:
        failing.close()
    where = f"(in a rollout worker on node {ray.util.get_node_ip_address()})"
    if isinstance(cause, UserError):
        assert type(caught.value) is UserError
        assert str(caught.value) == f"no such model {where}"
    else:
        lost = "4 rollout workers were lost without a reply in between"
        assert str(caught.value) == f"{lost}: ValueError: seven {where}"
