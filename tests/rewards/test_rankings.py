"""Likelihoods of rankings against slow ones: every order, every set, in float64."""

import math
from itertools import chain, combinations, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewards.losses import bradley_terry_loss
from rewards.rankings import davidson_luce_loss, open_ranking_loss, plackett_luce_loss

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=5).filter(lambda sizes: 2 <= sum(sizes) <= 8)


def draw(count: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, count, generator=generator, dtype=torch.float64)


def groups_of(scores: list[float], sizes: list[int]) -> list[list[float]]:
    rest = iter(scores)
    return [[next(rest) for _ in range(size)] for size in sizes]


def probability_of_order(scores: list[float]) -> float:
    """Plackett and Luce: one choice after the other."""
    return math.prod(math.exp(s) / sum(map(math.exp, scores[i:])) for i, s in enumerate(scores))


def probability_of_ties(scores: list[float], sizes: list[int], ties: list[float]) -> float:
    """Davidson and Luce: for each rank a set is chosen from all sets of the remaining responses."""

    def weight(chosen: tuple[float, ...]) -> float:
        return ties[len(chosen) - 1] * math.exp(sum(chosen) / len(chosen))

    probability = 1.0
    remaining = list(scores)
    for size in sizes:
        sets = chain.from_iterable(combinations(remaining, count) for count in range(1, len(ties) + 1))
        probability *= weight(tuple(remaining[:size])) / sum(map(weight, sets))
        remaining = remaining[size:]
    return probability


def probability_of_any_order(scores: list[float], sizes: list[int]) -> float:
    """The sum over all orders within all groups."""
    orders: list[list[float]] = [[]]
    for group in groups_of(scores, sizes):
        orders = [[*order, *group_order] for order in orders for group_order in permutations(group)]
    return sum(map(probability_of_order, orders))


@pytest.mark.parametrize("count", range(2, 9))
def test_strict_rankings_are_successive_choices(count: int) -> None:
    scores = draw(count, count)
    expected = [-math.log(probability_of_order(row)) for row in scores.tolist()]
    torch.testing.assert_close(plackett_luce_loss(scores), torch.tensor(expected, dtype=torch.float64))


def test_the_probabilities_of_all_orders_sum_to_one() -> None:
    rows = torch.tensor(list(permutations([0.3, -1.2, 2.0, 0.5])), dtype=torch.float64)
    assert float(torch.exp(-plackett_luce_loss(rows)).sum()) == pytest.approx(1)


def test_two_without_ties_are_a_pair() -> None:
    scores = draw(2, 0)
    nothing, sure = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    pair = bradley_terry_loss(scores[:, 0], scores[:, 1], nothing, sure)
    torch.testing.assert_close(plackett_luce_loss(scores), pair)
    torch.testing.assert_close(davidson_luce_loss(scores, (1, 1), torch.zeros(1, dtype=torch.float64)), pair)
    torch.testing.assert_close(open_ranking_loss(scores, (1, 1)), pair)


@given(SIZES, st.integers(0, 1000))
def test_judged_ties_choose_among_all_sets(sizes: list[int], seed: int) -> None:
    scores, most = draw(sum(sizes), seed), max(sizes)
    log_ties = torch.tensor([0.0, -0.7, 0.4][:most], dtype=torch.float64)
    ties = log_ties.exp().tolist()
    expected = [-math.log(probability_of_ties(row, sizes, ties)) for row in scores.tolist()]
    actual = davidson_luce_loss(scores, sizes, log_ties)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@given(SIZES, st.integers(0, 1000))
def test_ties_of_unknown_order_sum_over_all_orders(sizes: list[int], seed: int) -> None:
    scores = draw(sum(sizes), seed)
    if math.prod(map(math.factorial, sizes)) > 500:
        return
    expected = [-math.log(probability_of_any_order(row, sizes)) for row in scores.tolist()]
    actual = open_ranking_loss(scores, sizes)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_without_ties_all_three_losses_are_equal() -> None:
    scores, ones = draw(6, 1), (1,) * 6
    expected = plackett_luce_loss(scores)
    torch.testing.assert_close(davidson_luce_loss(scores, ones, torch.zeros(1, dtype=torch.float64)), expected)
    torch.testing.assert_close(open_ranking_loss(scores, ones), expected)


def test_the_best_of_many_is_a_softmax() -> None:
    scores = draw(40, 2)
    torch.testing.assert_close(open_ranking_loss(scores, (1, 39)), -scores.log_softmax(-1)[:, 0])


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 3), (1, 4), (3, 2), (1, 1, 2, 4)])
def test_gradients_are_finite_differences(sizes: tuple[int, ...]) -> None:
    scores = draw(sum(sizes), 3).requires_grad_(True)
    log_ties = torch.tensor([0.0, 0.3, -0.5, 0.1][: max(sizes)], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: davidson_luce_loss(s, sizes, t), (scores, log_ties))
    assert torch.autograd.gradcheck(lambda s: open_ranking_loss(s, sizes), (scores,))
    assert torch.autograd.gradcheck(plackett_luce_loss, (scores,))


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_losses_of_extreme_scores_in_float32_are_finite(scale: float) -> None:
    scores = draw(8, 4, scale).float().requires_grad_(True)
    log_ties = torch.zeros(4, requires_grad=True)
    loss = davidson_luce_loss(scores, (4, 1, 3), log_ties) + open_ranking_loss(scores, (4, 1, 3))
    (loss + plackett_luce_loss(scores)).sum().backward()
    assert torch.isfinite(loss).all()
    assert scores.grad is not None
    assert log_ties.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert torch.isfinite(log_ties.grad).all()


def test_nothing_changes_with_a_shift_of_all_scores() -> None:
    scores, log_ties = draw(5, 5), torch.tensor([0.0, 0.5], dtype=torch.float64)
    for loss in (plackett_luce_loss, lambda s: davidson_luce_loss(s, (2, 2, 1), log_ties),
                 lambda s: open_ranking_loss(s, (2, 3))):  # fmt: skip
        torch.testing.assert_close(loss(scores + 7), loss(scores))
