import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from align.config.schema import LearnerSettings
from align.learner.optimizer import RoleClip, make_optimizer
from align.roles.trained import ParameterGroup
from policies.errors import UserError
from policies.schema import OptimizerSettings
from rewards.schema import FitSettings, RewardSettings


def one_group() -> list[ParameterGroup]:
    return [ParameterGroup("policy", [nn.Parameter(torch.ones(1))])]


def two_groups(policy: float, critic: float, **settings: object) -> tuple[torch.optim.Optimizer, RoleClip]:
    """An optimizer at learning rate 1 whose groups have gradients of these norms, and its clip at norm 1."""
    groups = [
        ParameterGroup("policy", [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))]),
        ParameterGroup("critic", [nn.Parameter(torch.ones(9))]),
    ]
    optimizer = make_optimizer(LearnerSettings(**{"optimizer": "sgd", **settings}), groups)
    for group, norm in zip(optimizer.param_groups, (policy, critic)):
        group["lr"] = 1.0
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, norm / 3)
    clip = RoleClip(1.0)
    optimizer.register_step_pre_hook(clip)
    return optimizer, clip


def moved(optimizer: torch.optim.Optimizer) -> list[float]:
    """How far each group has gone from where it began."""
    return [
        float(torch.cat([parameter.detach() - 1 for parameter in group["params"]]).norm())
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    ("settings", "epsilon"), [(LearnerSettings, 1e-5), (FitSettings, 1e-8), (RewardSettings, 1e-8)]
)
def test_adamw_is_the_default_with_the_epsilon_of_the_stage(settings: type[OptimizerSettings], epsilon: float) -> None:
    optimizer = make_optimizer(settings(weight_decay=0.1), one_group())
    assert isinstance(optimizer, AdamW)
    assert optimizer.param_groups[0]["eps"] == epsilon
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_sgd_is_plain() -> None:
    optimizer = make_optimizer(LearnerSettings(optimizer="sgd", weight_decay=0.1), one_group())
    assert isinstance(optimizer, SGD)
    assert optimizer.param_groups[0]["momentum"] == 0
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


def test_groups_keep_their_names_parameters_and_options() -> None:
    policy, critic = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer(
        LearnerSettings(weight_decay=0.1),
        [
            ParameterGroup("policy", [policy]),
            ParameterGroup("critic.own", [critic], 2.0, {"eps": 0.5, "weight_decay": 0}),
        ],
    )
    assert [group["role"] for group in optimizer.param_groups] == ["policy", "critic.own"]
    assert [group["factor"] for group in optimizer.param_groups] == [1.0, 2.0]
    assert [(group["eps"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-5, 0.1), (0.5, 0)]
    assert optimizer.param_groups[0]["params"][0] is policy
    assert optimizer.param_groups[1]["params"][0] is critic


def test_each_role_is_clipped_by_its_own_norm() -> None:
    optimizer, clip = two_groups(policy=50.0, critic=0.5)
    optimizer.step()
    assert moved(optimizer) == pytest.approx([1.0, 0.5], rel=1e-5)
    assert clip.norms == pytest.approx({"policy": 50.0, "critic": 0.5}, rel=1e-5)


def test_a_gradient_within_the_limit_is_left_bit_for_bit() -> None:
    optimizer, _ = two_groups(policy=0.3, critic=0.9)
    before = [parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.step()
    after = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    assert all(torch.equal(one, other) for one, other in zip(before, after))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_no_role_moves_further_than_the_limit(policy: float, critic: float) -> None:
    optimizer, _ = two_groups(policy, critic)
    optimizer.step()
    assert moved(optimizer) == pytest.approx([min(1.0, policy), min(1.0, critic)], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_gradient_that_is_not_finite_changes_neither_role(bad: float, kind: str) -> None:
    optimizer, clip = two_groups(policy=1.0, critic=1.0, optimizer=kind, weight_decay=0.1)
    optimizer.param_groups[1]["params"][0].grad[2] = bad
    optimizer.step()
    assert moved(optimizer) == [0.0, 0.0]
    assert clip.skipped == 1
    assert not optimizer.state


def test_only_bad_steps_are_counted() -> None:
    optimizer, clip = two_groups(policy=1.0, critic=1.0)
    optimizer.step()
    assert clip.skipped == 0


def test_a_paged_optimizer_without_a_gpu_says_what_to_use() -> None:
    with pytest.raises(UserError, match="there is no GPU here: use adamw"):
        make_optimizer(LearnerSettings(optimizer="paged_adamw"), one_group())
