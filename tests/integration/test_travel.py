"""What travels between the controller and learner ranks in real Ray actors."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from align.algorithms.episodes import Episode, make_episodes
from align.config.ppo_settings import PpoSettings
from align.config.schema import ClusterSettings, LearnerSettings
from align.ppo import learners as ppo_learners
from align.ppo.episode_shards import EpisodeShards, make_shards
from align.ppo.learner import PpoLearner, StepCoefficients
from align.ppo.learners import PpoLearners, ray_learners
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint
from align.roles.scoring import ALL_ROLES
from policies.device import ActorOptions, ComputeSettings
from policies.schema import ModelSettings, PolicySettings
from rollouts.trajectory import Request, Trajectory
from tests.random_episodes import data_bytes

RANKS = 2
COUNT = 64
PPO = PpoSettings(batch_size=COUNT, minibatches=2, epochs=2)
ORDERS = [[list(range(0, COUNT, 2)), list(range(1, COUNT, 2))], [list(range(32)), list(range(32, COUNT))]]
STEP = StepCoefficients(1e-2, 1e-2, 0.0)
MANY = 10_000
"""More bytes than an empty reply has, and fewer than the weights of the smallest adapter."""


class ObservedLearner(PpoLearner):
    """A learner that also says which shards it has fetched."""

    def update(self, episodes: Any, *arguments: Any) -> dict[str, Any]:
        assert isinstance(episodes, EpisodeShards)
        statistics = super().update(episodes, *arguments)
        return statistics | {"fetched": sorted(episodes._fetched)}


def build_observed(*arguments: Any) -> PpoLearner:
    """As `build_ppo_learner`."""
    learner = build_ppo_learner(*arguments)
    learner.__class__ = ObservedLearner
    return learner


build_ppo_learner = ppo_learners.build_ppo_learner


@pytest.fixture(scope="module")
def learners(tiny_model: Path) -> Iterator[PpoLearners]:
    with ray_cluster(ClusterSettings(), RANKS), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_learners, "build_ppo_learner", build_observed)
        blueprint = Blueprint(ModelSettings(path=str(tiny_model)), PolicySettings(rank=4, alpha=8), 0, None)
        started = ray_learners(
            blueprint, PPO, LearnerSettings(ranks=RANKS), 1.0, [ActorOptions(ComputeSettings(1))] * 2
        )
        yield started
        started.close()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of each object that the controller puts into the object store."""
    sizes: list[int] = []
    original = ray.put

    def measured(value: Any) -> Any:
        sizes.append(size(value))
        return original(value)

    monkeypatch.setattr(ray, "put", measured)
    return sizes


def size(value: Any) -> int:
    """Bytes of a value as Ray stores it: by pickle's protocol 5, arrays apart from the rest and without a copy."""
    arrays: list[pickle.PickleBuffer] = []
    pickled = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    return len(pickled) + sum(array.raw().nbytes for array in arrays)


def trajectories() -> list[Trajectory]:
    noise = torch.Generator().manual_seed(0)
    drawn = []
    for number in range(COUNT):
        prompt, response = 50, 150 + number
        ids = torch.randint(4, 290, (prompt + response,), generator=noise).tolist()
        request = Request("a prompt " * 50, tuple(ids[:prompt]), number, {"column": "text " * 50})
        drawn.append(Trajectory.from_tokens(request, ids[prompt:], torch.zeros(response), True, 0))
    return drawn


def score(learners: PpoLearners) -> list[Episode]:
    outputs = learners.score(trajectories())
    scored = [replace(output, score=float(i)) for i, output in enumerate(outputs)]
    return make_episodes(trajectories(), scored, PPO, 0.1)


@pytest.mark.slow
def test_a_step_puts_hardly_more_than_its_data(learners: PpoLearners, put: list[int]) -> None:
    episodes = score(learners)
    data = data_bytes(episodes)
    ids = sum(4 * episode.length for episode in episodes)
    assert sum(put) <= 1.2 * ids + 4096 * RANKS
    learners.update(episodes, ORDERS, STEP)
    assert sum(put) <= 1.3 * data


def test_scores_return_as_their_tensors(learners: PpoLearners) -> None:
    rows = trajectories()
    for rank in range(RANKS):
        arguments: Sequence[Any] = [(rows[rank::RANKS], ALL_ROLES)] * RANKS
        outputs = learners.ranks.scatter(PpoLearner.score, arguments)[rank]
        tensors = sum(4 * (3 * len(output.logprobs) + 1) for output in outputs)
        assert size(outputs) <= 1.2 * tensors + 4096


def test_weights_leave_one_rank_once(learners: PpoLearners) -> None:
    first, *others = map(size, learners.ranks.call(PpoLearner.policy_weights))
    tensors = sum(tensor.nbytes for tensor in learners.policy_weights().values())
    assert tensors > MANY
    assert tensors <= first <= 1.2 * tensors + 500 * len(learners.policy_weights())
    assert all(other < 100 for other in others)


def test_a_rank_fetches_the_shards_that_it_trains_on(learners: PpoLearners) -> None:
    episodes = score(learners)
    for orders, fetched in ((ORDERS[:1], [[0], [1]]), (ORDERS, [[0, 1], [0, 1]])):
        shards = make_shards(episodes, orders, RANKS, learners.ranks.share)
        replies: list[dict[str, Any]] = learners.ranks.call(PpoLearner.update, shards, orders, STEP, ())
        assert [reply["fetched"] for reply in replies] == fetched


def test_the_controller_fetches_states_one_by_one(learners: PpoLearners, monkeypatch: pytest.MonkeyPatch) -> None:
    states = learners.state()
    fetched: list[int] = []
    original = ray.get

    def observed(references: Sequence[Any], **options: Any) -> Any:
        fetched.append(len(references))
        return original(references, **options)

    monkeypatch.setattr(ray, "get", observed)
    assert states[1].optimizer.keys() == states[0].optimizer.keys()
    assert fetched == [1, 1]
