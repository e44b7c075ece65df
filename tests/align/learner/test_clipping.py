"""Gradients are clipped by role, each over all its parameter groups, at every ZeRO stage and number of ranks."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from align.algorithms.episodes import Episode
from align.config.ppo_settings import CriticSettings, PpoSettings
from align.config.schema import ClusterSettings, LearnerSettings
from align.learner.optimizer import RoleClip, make_optimizer
from align.ppo.learner import StepCoefficients
from align.ppo.learners import PpoLearners, local_learners, ray_learners
from align.resources.ray_cluster import ray_cluster
from align.roles.build import Blueprint, RewardRole, build_roles
from align.roles.trained import ParameterGroup
from policies.build import build_trunk
from policies.device import ActorOptions, ComputeSettings
from policies.schema import ModelSettings, PolicySettings

RATIO = 16.0
POLICY = PolicySettings(rank=4, alpha=8.0, lora_plus=RATIO)
PPO = PpoSettings(batch_size=6, minibatches=1, epochs=1)
SGD = LearnerSettings(optimizer="sgd", max_grad_norm=1e9, tokens_per_microbatch=100)
LIMIT = 0.01
STEEP = StepCoefficients(1e3, 1e3, 0.0)
"""So steep that float32 keeps the gradient's digits when it is read off the change of the weights."""
STAGES = (0, 1, 2, 3)


def test_both_groups_of_a_role_are_scaled_by_one_factor() -> None:
    """The gradients of A and B have the norms 3 and 40, the critic's 0.5; the limit is 1."""
    groups = {"policy": [nn.Parameter(torch.zeros(9))], "critic": [nn.Parameter(torch.zeros(4))]}
    groups["policy.up"] = [nn.Parameter(torch.zeros(16))]
    optimizer = make_optimizer(SGD, [ParameterGroup(name, parameters) for name, parameters in groups.items()])
    for (parameter,), value in zip(groups.values(), (1.0, 0.25, 10.0)):
        parameter.grad = torch.full_like(parameter, value)
    clip = RoleClip(1.0)
    optimizer.register_step_pre_hook(clip)
    optimizer.step()
    norm = math.hypot(3, 40)
    assert clip.norms == pytest.approx({"policy": norm, "critic": 0.5})
    after = {name: float(parameter.grad.norm()) for name, (parameter,) in groups.items() if parameter.grad is not None}
    assert after == pytest.approx({"policy": 3 / norm, "policy.up": 40 / norm, "critic": 0.5}, rel=1e-5)


def blueprint(model: Path) -> Blueprint:
    """The policy's adapter and the critic's are random: with B at zero, A would have no gradient."""
    settings = ModelSettings(path=str(model))
    trunk = build_trunk(settings, POLICY, ("policy",))
    noise = torch.Generator().manual_seed(3)
    adapters = []
    for _ in range(2):
        adapters.append({n: 0.1 * torch.randn(p.shape, generator=noise) for n, p in trunk.adapter("policy").items()})
    head = {"weight": torch.randn(trunk.width, generator=noise) / 6, "bias": torch.tensor([0.25])}
    return Blueprint(settings, POLICY, 0, adapters[0], (RewardRole(adapters[1], (head,)),))


def episodes(bad: bool = False) -> list[Episode]:
    noise = torch.Generator().manual_seed(0)
    drawn = []
    for length in (3, 9, 5, 14, 7, 4):
        ids = torch.randint(4, 290, (2 + length,), generator=noise).tolist()
        parts = torch.randn(5, length, generator=noise)
        episode = Episode(
            prompt_ids=tuple(ids[:2]),
            response_ids=tuple(ids[2:]),
            old_logprobs=parts[0] - 6,
            reference_logprobs=parts[1] - 6,
            advantages=parts[2],
            returns=parts[3],
            old_values=parts[4],
        )
        drawn.append(episode)
    if bad:
        drawn[2].returns[1] = math.nan
    return drawn


ORDER = [[list(range(6))]]
Weights = dict[str, Tensor]


def read(learners: PpoLearners) -> tuple[Weights, Weights]:
    """The complete weights of policy and critic."""
    weights = learners.state()[0].weights
    head = {f"head.{name}": value for name, value in weights.heads["critic"].items()}
    return weights.adapters["policy"], weights.adapters["critic"] | head


def gradients(learners: PpoLearners) -> tuple[list[Weights], dict[str, float]]:
    """What one step of plain gradient descent subtracts, divided by each parameter's rate, and its statistics."""
    before = read(learners)
    statistics = learners.update(episodes(), ORDER, STEEP)
    moved = []
    for old, new in zip(before, read(learners)):
        steps = {}
        for name, tensor in old.items():
            rate = STEEP.policy_lr * (RATIO if ".lora_B." in name else 1.0)
            steps[name] = (tensor.double() - new[name].double()) / rate
        moved.append(steps)
    return moved, statistics


def norm_of(weights: Weights) -> float:
    return math.hypot(*(float(tensor.norm()) for tensor in weights.values()))


@pytest.fixture(scope="module")
def unclipped(tiny_model: Path) -> list[Weights]:
    """The gradients of policy and critic, by one process without sharding."""
    learners = local_learners(build_roles(blueprint(tiny_model), CriticSettings()), PPO, SGD, 1.0, False)
    measured, _ = gradients(learners)
    learners.close()
    return measured


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterSettings(), 2):
        yield


def one_rank(model: Path, zero: int) -> PpoLearners:
    settings = SGD.model_copy(update={"zero": zero, "max_grad_norm": LIMIT})
    return local_learners(build_roles(blueprint(model), CriticSettings()), PPO, settings, 1.0, False)


def two_ranks(model: Path, zero: int) -> PpoLearners:
    settings = SGD.model_copy(update={"zero": zero, "max_grad_norm": LIMIT, "ranks": 2})
    return ray_learners(blueprint(model), PPO, settings, 1.0, [ActorOptions(ComputeSettings(1))] * 2)


def check(build: Callable[[Path, int], PpoLearners], model: Path, zero: int, expected: list[Weights]) -> None:
    """Clipped steps have the direction of the whole role's gradient; a step that is not finite changes nothing."""
    learners = build(model, zero)
    measured, statistics = gradients(learners)
    before = read(learners)
    assert learners.update(episodes(bad=True), ORDER, STEEP)["skipped_steps"] == 1
    after = read(learners)
    learners.close()
    for role, clipped, gradient in zip(("policy", "critic"), measured, expected):
        norm = norm_of(gradient)
        assert norm > 10 * LIMIT
        assert statistics[f"{role}_gradient_norm"] == pytest.approx(norm, rel=1e-4)
        up = norm_of({name: tensor for name, tensor in gradient.items() if ".lora_B." in name})
        assert 0.05 < up / norm < 0.999  # both parts count
        for name, tensor in gradient.items():
            torch.testing.assert_close(clipped[name], tensor * (LIMIT / norm), rtol=1e-2, atol=1e-3 * LIMIT)
        assert norm_of(clipped) == pytest.approx(LIMIT, rel=1e-3)
    for old, new in zip(before, after):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("zero", STAGES)
def test_lora_plus_is_clipped_by_role_on_one_rank(zero: int, tiny_model: Path, unclipped: list[Weights]) -> None:
    check(one_rank, tiny_model, zero, unclipped)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_lora_plus_is_clipped_by_role_on_two_ranks(
    zero: int, tiny_model: Path, unclipped: list[Weights], cluster: None
) -> None:
    check(two_ranks, tiny_model, zero, unclipped)
