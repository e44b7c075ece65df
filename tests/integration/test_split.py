"""The same gradient and the same responses however the work is split over Ray actors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.episodes import Episode
from align.config.ppo_settings import CriticSettings, PpoSettings
from align.config.schema import ClusterSettings, LearnerSettings
from align.ppo.learner import StepCoefficients
from align.ppo.learners import PpoLearners, local_learners, ray_learners
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint
from policies.device import ActorOptions, ComputeSettings
from policies.schema import ModelSettings, PolicySettings
from rollouts.trajectory import Request, Trajectory

POLICY = PolicySettings(rank=4, alpha=8)
PPO = PpoSettings(batch_size=13, minibatches=1, epochs=1)
SGD = LearnerSettings(optimizer="sgd", max_grad_norm=1e12, tokens_per_microbatch=100)
STEEP = StepCoefficients(1e3, 1e3, 0.0)
"""So steep that float32 keeps the gradient's digits when it is read off the change of the weights."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterSettings(), 4):
        yield


def blueprint(model: Path) -> Blueprint:
    return Blueprint(ModelSettings(path=str(model)), POLICY, 0, None)


def episodes() -> list[Episode]:
    """Sequences of many lengths, with targets far from the model's own."""
    noise = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=noise))

    drawn_episodes = []
    for _ in range(13):
        prompt, response = drawn(1, 10), drawn(1, 30)
        ids = [drawn(4, 290) for _ in range(prompt + response)]
        parts = [torch.randn(response, generator=noise) for _ in range(5)]
        episode = Episode(
            prompt_ids=tuple(ids[:prompt]),
            response_ids=tuple(ids[prompt:]),
            old_logprobs=parts[0] - 6,
            reference_logprobs=parts[1] - 6,
            advantages=parts[2],
            returns=parts[3],
            old_values=parts[4],
        )
        drawn_episodes.append(episode)
    return drawn_episodes


def gradient(learners: PpoLearners) -> torch.Tensor:
    """The policy's complete gradient, read off one step of plain gradient descent."""
    before = learners.policy_weights()
    learners.update(episodes(), [[list(range(13))]], STEEP)
    after = learners.policy_weights()
    return torch.cat([(before[name] - after[name]).flatten().double() for name in before]) / STEEP.policy_lr


def losses(learners: PpoLearners) -> list[float]:
    """Losses of the first three updates under plain gradient descent."""
    coefficients = StepCoefficients(1e-1, 1e-1, 0.0)
    updates = [learners.update(episodes(), [[list(range(13))]], coefficients) for _ in range(3)]
    return [update[name] for update in updates for name in ("policy_loss", "value_loss")]


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> tuple[torch.Tensor, list[float]]:
    """Gradient and losses of one process without sharding."""
    results: list[Any] = []
    for measure in (gradient, losses):
        learners = local_learners(build(tiny_model), PPO, SGD, 1.0, False)
        results.append(measure(learners))
        learners.close()
    return results[0], results[1]


def build(model: Path) -> Any:
    from align.roles.build import build_roles

    return build_roles(blueprint(model), CriticSettings())


def one_thread(ranks: int) -> list[ActorOptions]:
    return [ActorOptions(ComputeSettings(1))] * ranks


SPLITS = [
    pytest.param(1, 0, marks=pytest.mark.slow),
    pytest.param(2, 0, marks=pytest.mark.slow),
    pytest.param(2, 1, marks=pytest.mark.slow),
    (2, 2),
    pytest.param(2, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "zero"), SPLITS)
def test_ranks_and_zero_stages_give_one_gradient(
    ranks: int, zero: int, tiny_model: Path, cluster: None, alone: tuple[torch.Tensor, list[float]]
) -> None:
    split = SGD.model_copy(update={"ranks": ranks, "zero": zero})
    expected_gradient, expected_losses = alone
    learners = ray_learners(blueprint(tiny_model), PPO, split, 1.0, one_thread(ranks))
    measured_gradient = gradient(learners)
    learners.close()
    assert expected_gradient.norm() > 0.1
    assert float((measured_gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-6
    learners = ray_learners(blueprint(tiny_model), PPO, split, 1.0, one_thread(ranks))
    measured_losses = losses(learners)
    learners.close()
    assert measured_losses == pytest.approx(expected_losses, abs=1e-5)


@pytest.mark.slow
def test_there_may_be_fewer_sequences_than_ranks(tiny_model: Path, cluster: None) -> None:
    trajectory = Trajectory.from_tokens(Request("", (5, 6), 0), (7, 8, 9), torch.zeros(3), True, 0)
    results = []
    for split in (SGD, SGD.model_copy(update={"ranks": 2})):
        if split.ranks:
            learners: PpoLearners = ray_learners(blueprint(tiny_model), PPO, split, 1.0, one_thread(2))
        else:
            learners = local_learners(build(tiny_model), PPO, split, 1.0, False)
        (scored,) = learners.score([trajectory])
        update = learners.update(episodes()[:1], [[[0]]], STEEP)
        results.append([*scored.logprobs.tolist(), update["policy_loss"], update["policy_gradient_norm"]])
        learners.close()
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("old", "new"), [((0, 0), (2, 2)), ((2, 2), (1, 0)), ((2, 3), (2, 1)), ((1, 1), (2, 3))])
def test_a_state_continues_in_another_layout(
    old: tuple[int, int], new: tuple[int, int], tiny_model: Path, cluster: None
) -> None:
    settings = LearnerSettings(tokens_per_microbatch=100)
    coefficients, order = StepCoefficients(1e-2, 1e-2, 0.0), [[list(range(13))]]

    def learners(split: tuple[int, int]) -> PpoLearners:
        ranks, zero = split
        chosen = settings.model_copy(update={"ranks": ranks, "zero": zero})
        if ranks:
            return ray_learners(blueprint(tiny_model), PPO, chosen, 1.0, one_thread(ranks))
        return local_learners(build(tiny_model), PPO, chosen, 1.0, False)

    first = learners(old)
    first.update(episodes(), order, coefficients)
    states, weights = first.state(), first.policy_weights()
    expected = first.update(episodes(), order, coefficients)
    after = first.policy_weights()
    first.close()
    second = learners(new)
    second.restore(states, old[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in second.policy_weights().items())
    update = second.update(episodes(), order, coefficients)
    assert update["policy_gradient_norm"] == pytest.approx(expected["policy_gradient_norm"], rel=1e-5)
    for name, tensor in second.policy_weights().items():
        torch.testing.assert_close(tensor, after[name], atol=1e-5, rtol=1e-4)
    second.close()
