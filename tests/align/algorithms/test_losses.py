import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.algorithms.kl import estimate_kl
from align.algorithms.losses import clipped_policy_loss, clipped_value_loss
from rewards.losses import bradley_terry_loss

NUMBERS = st.floats(-3, 3, width=32)
CLIP = st.floats(0.05, 0.9)


def policy_gradient(logprob: float, old: float, advantage: float, low: float, high: float) -> float:
    new = torch.tensor([logprob], requires_grad=True)
    loss, _ = clipped_policy_loss(new, torch.tensor([old]), torch.tensor([advantage]), low, high)
    loss.sum().backward()
    assert new.grad is not None
    return float(new.grad)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20), CLIP, CLIP)
def test_policy_loss_is_the_formula(rows: list[tuple[float, float, float]], low: float, high: float) -> None:
    new, old, advantages = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    loss, _ = clipped_policy_loss(new, old, advantages, low, high)
    oracle = []
    for logprob, before, advantage in zip(new.tolist(), old.tolist(), advantages.tolist()):
        ratio = 2.718281828459045 ** (logprob - before)
        oracle.append(-min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high)))
    torch.testing.assert_close(loss, torch.tensor(oracle, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "binds"),
    [
        (1.5, 1.0, True),  # already much likelier: no more
        (1.5, -1.0, False),  # must come down again
        (0.5, 1.0, False),  # must come up again
        (0.5, -1.0, True),  # already much rarer: no more
        (1.1, 1.0, False),
        (0.9, -1.0, False),
        (1.25, 1.0, False),  # between the low bound's width and the high one's
        (0.75, -1.0, True),
    ],
)
def test_gradient_is_zero_where_the_clip_binds(ratio: float, advantage: float, binds: bool) -> None:
    logprob = float(torch.log(torch.tensor(ratio)))
    gradient = policy_gradient(logprob, 0.0, advantage, low=0.2, high=0.3)
    assert gradient == pytest.approx(0.0 if binds else -advantage * ratio, rel=1e-5)
    new = torch.tensor([logprob])
    _, clipped = clipped_policy_loss(new, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.3)
    assert clipped.tolist() == [float(binds)]


def test_first_gradient_is_that_of_reinforce() -> None:
    assert policy_gradient(-1.3, -1.3, 0.7, low=0.2, high=0.2) == pytest.approx(-0.7)


def test_policy_loss_sends_no_gradient_to_its_targets() -> None:
    old, advantages = torch.zeros(1), torch.ones(1)
    loss, clipped = clipped_policy_loss(torch.zeros(1, requires_grad=True), old, advantages, 0.2, 0.2)
    assert loss.requires_grad
    assert not clipped.requires_grad


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20), CLIP)
def test_value_loss_is_the_formula(rows: list[tuple[float, float, float]], clip: float) -> None:
    values, old, returns = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    loss, _ = clipped_value_loss(values, old, returns, clip)
    oracle = []
    for value, before, target in zip(values.tolist(), old.tolist(), returns.tolist()):
        near = before + min(max(value - before, -clip), clip)
        oracle.append(max((value - target) ** 2, (near - target) ** 2) / 2)
    torch.testing.assert_close(loss, torch.tensor(oracle, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_value_loss_without_a_clip_is_half_the_square() -> None:
    loss, clipped = clipped_value_loss(torch.tensor([3.0]), torch.tensor([-9.0]), torch.tensor([1.0]), None)
    assert loss.tolist() == [2.0]
    assert clipped.tolist() == [0.0]


@pytest.mark.parametrize(
    ("value", "gradient"),
    [
        (0.5, 0.0),  # moved beyond the clip towards the return: enough
        (0.1, 0.1 - 1.0),  # within the clip
        (-0.5, -0.5 - 1.0),  # moved away from the return: come back
    ],
)
def test_value_gradient_is_zero_where_the_clip_binds(value: float, gradient: float) -> None:
    values = torch.tensor([value], requires_grad=True)
    loss, clipped = clipped_value_loss(values, torch.zeros(1), torch.ones(1), 0.2)
    loss.sum().backward()
    assert values.grad is not None
    assert float(values.grad) == pytest.approx(gradient)
    assert clipped.tolist() == [float(gradient == 0)]


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20), st.floats(1.1, 4))
def test_dual_clip_bounds_the_loss_of_bad_tokens_alone(rows: list[tuple[float, float, float]], dual: float) -> None:
    new, old, advantages = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    without, _ = clipped_policy_loss(new, old, advantages, 0.2, 0.2)
    loss, _ = clipped_policy_loss(new, old, advantages, 0.2, 0.2, dual)
    bound = torch.where(advantages < 0, -advantages * dual, torch.inf)
    torch.testing.assert_close(loss, torch.minimum(without, bound))


def test_dual_clip_stops_the_gradient_of_a_bad_token_that_runs_away() -> None:
    new = torch.tensor([math.log(4.0), math.log(2.0), math.log(4.0)], requires_grad=True)
    loss, clipped = clipped_policy_loss(new, torch.zeros(3), torch.tensor([-1.0, -1.0, 1.0]), 0.2, 0.2, dual=3.0)
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, 2.0, 0.0])
    assert clipped.tolist() == [1.0, 0.0, 1.0]


POINT = torch.tensor([-1.05, -0.62, -1.7, -0.9], dtype=torch.float64)
OLD = torch.tensor([-1.0, -0.5, -2.0, -1.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.5, -0.5, 0.7, -2.0], dtype=torch.float64)
HALF = torch.tensor([1.0, 0.5], dtype=torch.float64)
LOSSES = {
    "policy": lambda x: clipped_policy_loss(x, OLD, ADVANTAGES, 0.2, 0.3)[0],
    "policy, a dual clip that binds": lambda x: clipped_policy_loss(x, OLD - 2, ADVANTAGES, 0.2, 0.3, 3.0)[0],
    "value, a clip that binds": lambda x: clipped_value_loss(x, POINT + 0.7, ADVANTAGES, 0.2)[0],
    "value, a clip that does not": lambda x: clipped_value_loss(x, POINT + 0.1, ADVANTAGES, 0.2)[0],
    "value without a clip": lambda x: clipped_value_loss(x, POINT, ADVANTAGES, None)[0],
    "k1": lambda x: estimate_kl(x, OLD, "k1"),
    "k2": lambda x: estimate_kl(x, OLD, "k2"),
    "k3": lambda x: estimate_kl(x, OLD, "k3"),
    "pairs": lambda x: bradley_terry_loss(x[:2], x[2:], 0.1 * HALF, HALF),
}


@pytest.mark.parametrize("name", LOSSES)
def test_finite_differences_agree_with_the_gradient(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name], (POINT.clone().requires_grad_(),))
