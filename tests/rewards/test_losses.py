import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewards.losses import bradley_terry_loss, pair_accuracy, step_loss

SCORES = st.floats(-30, 30, width=32)
PAIRS = st.lists(st.tuples(SCORES, SCORES, st.floats(-3, 3, width=32), st.floats(0, 1, width=32)), min_size=1)


def softplus(x: float) -> float:
    """-log σ(-x), in Python's float64."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def oracle(chosen: float, rejected: float, margin: float, preference: float) -> float:
    difference = chosen - rejected - margin
    return preference * softplus(-difference) + (1 - preference) * softplus(difference)


def loss(chosen: float, rejected: float, margin: float = 0.0, preference: float = 1.0) -> float:
    return float(bradley_terry_loss(*(torch.tensor([x]) for x in (chosen, rejected, margin, preference))))


@given(PAIRS)
def test_loss_is_its_formula_pair_by_pair(pairs: list[tuple[float, float, float, float]]) -> None:
    expected = torch.tensor([oracle(*pair) for pair in pairs], dtype=torch.float64)
    actual = bradley_terry_loss(*torch.tensor(pairs, dtype=torch.float32).unbind(-1))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@given(PAIRS)
def test_gradient_is_its_formula_pair_by_pair(pairs: list[tuple[float, float, float, float]]) -> None:
    chosen, rejected, margin, preference = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    scores = (chosen.requires_grad_(True), rejected.requires_grad_(True))
    by_chosen, by_rejected = torch.autograd.grad(bradley_terry_loss(*scores, margin, preference).sum(), scores)
    expected = [1 / (1 + math.exp(-(c - r - m))) - p for c, r, m, p in pairs]
    torch.testing.assert_close(by_chosen, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_rejected, -by_chosen)


def test_equal_scores_cost_the_logarithm_of_two() -> None:
    assert loss(1.5, 1.5) == pytest.approx(math.log(2))


def test_scores_that_lie_the_margin_apart_cost_the_logarithm_of_two() -> None:
    assert loss(3.0, 1.0, margin=2.0) == pytest.approx(math.log(2))


def test_a_tie_costs_the_same_in_either_order() -> None:
    assert loss(3.0, 1.0, preference=0.5) == pytest.approx(loss(1.0, 3.0, preference=0.5))


def test_a_smoothed_label_is_cheapest_at_its_own_log_odds() -> None:
    best = math.log(0.9 / 0.1)
    assert loss(best, 0.0, preference=0.9) < min(loss(best + d, 0.0, preference=0.9) for d in (-0.1, 0.1))


def test_a_hopeless_pair_has_a_finite_loss_and_a_full_gradient() -> None:
    chosen = torch.tensor([-1e4], requires_grad=True)
    value = bradley_terry_loss(chosen, torch.tensor([1e4]), torch.zeros(1), torch.ones(1))
    value.sum().backward()
    assert value.item() == 2e4
    assert chosen.grad is not None
    assert chosen.grad.tolist() == [-1.0]


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_a_pair_that_is_surely_right_costs_nothing(preference: float) -> None:
    assert loss(1e4 * (2 * preference - 1), 0.0, preference=preference) == 0.0


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=1))
def test_accuracy_is_the_share_of_right_pairs_and_half_the_ties(pairs: list[tuple[int, int]]) -> None:
    chosen, rejected = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    expected = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in pairs) / len(pairs)
    assert float(pair_accuracy(chosen, rejected)) == pytest.approx(expected)


def test_accuracy_of_no_pairs_is_zero() -> None:
    empty: Tensor = torch.tensor([])
    assert pair_accuracy(empty, empty).item() == 0.0


@given(st.lists(st.tuples(SCORES, st.floats(0, 1, width=32)), min_size=1))
def test_the_loss_of_steps_is_their_cross_entropy(steps: list[tuple[float, float]]) -> None:
    logits, labels = torch.tensor(steps, dtype=torch.float64).unbind(-1)
    expected = [label * softplus(-logit) + (1 - label) * softplus(logit) for logit, label in steps]
    torch.testing.assert_close(step_loss(logits, labels), torch.tensor(expected, dtype=torch.float64))
