"""The loss of mixed preference examples against each one's formula, and the links of scores and annotations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewards.losses import bradley_terry_loss, ordinal_loss
from rewards.objective import OrdinalRatingLink, PreferenceLoss, TieParameters
from rewards.preferences import Pair, PreferenceExample, Ranking, Rating
from rewards.rankings import davidson_luce_loss, open_ranking_loss, plackett_luce_loss

WEIGHTS = {"kind": 0.25, "true": 2.0}


def example(*responses: str, preference: Pair | Ranking | Rating, attribute: str = "") -> PreferenceExample:
    return PreferenceExample("p", responses, preference, attribute)


MIXED = [
    example("a", "b", preference=Pair(margin=0.5)),
    example("a", "b", "c", "d", preference=Ranking((1, 2, 1))),
    example("a", preference=Rating({"": 4.0, "kind": 1.0})),
    example("a", "b", preference=Pair(certainty=0.8), attribute="kind"),
    example("a", "b", "c", preference=Ranking((1, 2), open=True), attribute="true"),
    example("a", preference=Rating({"": 2.0, "kind": 3.0})),
    example("a", "b", "c", "d", preference=Ranking((1, 2, 1))),
]


def scores_of(examples: list[PreferenceExample], attributes: int = 2, seed: int = 0) -> Tensor:
    count = sum(len(example.responses) for example in examples)
    return torch.randn(count, attributes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_example_of_a_mixed_batch_has_the_loss_of_its_kind() -> None:
    loss = PreferenceLoss(MIXED, WEIGHTS, "regression").double()
    scores = scores_of(MIXED)
    whole, kind, true = scores @ torch.tensor([0.25, 2.0], dtype=torch.float64), scores[:, 0], scores[:, 1]
    one = torch.ones(1, dtype=torch.float64)
    ties = loss.ties()
    expected = [
        bradley_terry_loss(whole[0:1], whole[1:2], 0.5 * one, one),
        davidson_luce_loss(whole[None, 2:6], (1, 2, 1), ties),
        # the two ratings of each attribute lie one standard deviation to either side of their mean
        ((whole[6:7] - 1).square() + (kind[6:7] + 1).square()) / 2,
        bradley_terry_loss(kind[7:8], kind[8:9], 0 * one, 0.8 * one),
        open_ranking_loss(true[None, 9:12], (1, 2)),
        ((whole[12:13] + 1).square() + (kind[12:13] - 1).square()) / 2,
        davidson_luce_loss(whole[None, 13:17], (1, 2, 1), ties),
    ]
    torch.testing.assert_close(loss(scores, MIXED), torch.cat(expected))


def test_smoothing_mixes_in_the_reversed_comparison() -> None:
    examples = [
        example("a", "b", preference=Pair()),
        example("a", "b", preference=Ranking((1, 1))),
        example("a", "b", "c", preference=Ranking((2, 1))),
    ]
    loss, scores = PreferenceLoss(examples, {"": 1.0}, "regression").double(), scores_of(examples, 1)
    pair, ranking, _ = loss(scores, examples, smoothing=0.1)
    right, wrong = (-torch.log(torch.sigmoid(sign * (scores[0, 0] - scores[1, 0]))) for sign in (1, -1))
    torch.testing.assert_close(pair, 0.9 * right + 0.1 * wrong)
    reverse = [example("b", "a", preference=Ranking((1, 1)))]
    swapped = loss(scores[[3, 2]], reverse)[0]
    torch.testing.assert_close(ranking, 0.9 * loss(scores[2:4], examples[1:2])[0] + 0.1 * swapped)


def test_rankings_without_ties_are_plackett_and_luces() -> None:
    examples = [example("a", "b", "c", preference=Ranking((1, 1, 1)))]
    loss, scores = PreferenceLoss(examples, {"": 1.0}, "regression").double(), scores_of(examples, 1)
    torch.testing.assert_close(loss(scores, examples), plackett_luce_loss(scores[None, :, 0]))


@pytest.mark.parametrize(
    ("rankings", "delta"),
    [
        ([Ranking((1, 1))] * 60 + [Ranking((2,))] * 40, [4 / 3]),  # of two, δ / (2 + δ) = 0.4
        # Of three, a tie of two has 3δ : 3; of the two that are left after a first, δ : 2.
        ([Ranking((2, 1))] * 12 + [Ranking((1, 2))] * 2 + [Ranking((1, 1, 1))], [4.0]),
        ([Ranking((1, 1))] * 60 + [Ranking((2,))] * 40 + [Ranking((1, 2), open=True)] * 99, [4 / 3]),
        ([Ranking((3,))] * 4 + [Ranking((2, 1))] * 3 + [Ranking((1, 2))] * 3, [2.5615528, 7.1231056]),
    ],
    ids=["two", "three", "others of unknown order", "ties of three"],
)
def test_tie_parameters_start_where_equal_worths_make_the_rankings_most_likely(
    rankings: list[Ranking], delta: list[float]
) -> None:
    ties = TieParameters(rankings, examples=len(rankings))
    assert ties()[1:].exp().tolist() == pytest.approx(delta, rel=1e-5)
    closed = [ranking for ranking in rankings if not ranking.open]

    def loss(log_ties: torch.Tensor) -> torch.Tensor:
        losses = []
        for ranking in closed:
            scores = torch.zeros(1, sum(ranking.sizes), dtype=torch.float64)
            losses.append(davidson_luce_loss(scores, ranking.sizes, log_ties))
        return torch.cat(losses).sum()

    free = torch.tensor([delta], dtype=torch.float64).log()[0].requires_grad_()
    loss(torch.cat([torch.zeros(1, dtype=torch.float64), free])).backward()
    torch.testing.assert_close(free.grad, torch.zeros_like(free), rtol=0, atol=1e-5)


def test_tie_parameters_are_finite_where_a_size_never_occurs() -> None:
    assert TieParameters([Ranking((2,))] * 9, examples=9)()[1].exp().item() == pytest.approx(2 * 9 / 0.5)
    ties = TieParameters([Ranking((3,))] * 9, examples=9, largest=4)
    assert ties().isfinite().all()
    assert ties()[3] == 0  # no ranking has four responses


def test_tie_parameters_start_from_the_training_data_alone() -> None:
    def of(sizes: tuple[int, ...], count: int) -> list[PreferenceExample]:
        return [example(*"abc"[: sum(sizes)], preference=Ranking(sizes))] * count

    loss = PreferenceLoss(of((1, 1), 60) + of((2,), 40), {"": 1.0}, "regression", of((2,), 500) + of((3,), 1))
    assert loss.ties()[1].exp().item() == pytest.approx(4 / 3)
    assert len(loss.ties()) == 3  # enough for the held-out examples


def test_gradients_of_tie_parameters_add_up_to_those_of_the_likelihood() -> None:
    """They are per choice instead of per example, and only their sum over all examples is the likelihood's."""
    rankings = [Ranking((1, 1)), Ranking((2,)), Ranking((2, 1)), Ranking((1, 2)), Ranking((1, 1, 1)), Ranking((1, 2))]
    examples = [example(*"abc"[: sum(ranking.sizes)], preference=ranking) for ranking in rankings]
    loss, scores = PreferenceLoss(examples, {"": 1.0}, "regression").double(), scores_of(examples, 1)
    loss(scores, examples).sum().backward()
    log_ties = loss.ties().detach().requires_grad_()
    start = 0
    for ranking in rankings:
        end = start + sum(ranking.sizes)
        davidson_luce_loss(scores[None, start:end, 0], ranking.sizes, log_ties).sum().backward()
        start = end
    choices = 9  # places with two and more responses left
    assert log_ties.grad is not None
    torch.testing.assert_close(loss.ties.free.grad, log_ties.grad[1:] * len(examples) / choices)


def test_gradients_of_tie_parameters_do_not_depend_on_how_many_ties_a_batch_has() -> None:
    rankings = [Ranking((1, 1))] * 60 + [Ranking((2,))] * 40
    examples = [example("a", "b", preference=ranking) for ranking in rankings]
    loss = PreferenceLoss(examples, {"": 1.0}, "regression")
    gradients = []
    for batch in (examples[:20], examples[50:70], examples[-20:]):
        (gradient,) = torch.autograd.grad(loss(torch.zeros(40, 1), batch).mean(), loss.ties.free)
        gradients.append(gradient.item())
    assert gradients == pytest.approx([0.0] * 3, abs=1e-6)


def test_the_links_of_scores_and_annotations_are_trained() -> None:
    loss = PreferenceLoss(MIXED, WEIGHTS, "ordinal").double()
    loss(scores_of(MIXED), MIXED).sum().backward()
    assert {name for name, p in loss.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == {
        "ties.free", "links.overall.first", "links.of kind.first",
    }  # fmt: skip


@given(st.lists(st.integers(1, 5), min_size=2, max_size=40).filter(lambda ratings: len(set(ratings)) > 1))
def test_levels_start_with_their_shares_of_the_data(ratings: list[int]) -> None:
    link = OrdinalRatingLink([float(rating) for rating in ratings]).double()
    values = torch.tensor(sorted(set(ratings)), dtype=torch.float64)
    probabilities = torch.exp(-link.losses(torch.zeros(len(values), dtype=torch.float64), values, link()))
    expected = torch.tensor([ratings.count(int(v)) / len(ratings) for v in values], dtype=torch.float64)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_ordinal_loss_is_the_difference_of_two_sigmoids(levels: int) -> None:
    thresholds = torch.linspace(-1, 2, levels - 1, dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([-3.0, 0.2, 1.7, 6.0], dtype=torch.float64, requires_grad=True)
    for level in range(levels):
        index = torch.full((4,), level)
        ends = [-math.inf, *thresholds.tolist(), math.inf]
        expected = [
            -math.log(1 / (1 + math.exp(s - ends[level + 1])) - (1 / (1 + math.exp(s - ends[level]))))
            for s in scores.tolist()
        ]
        actual = ordinal_loss(scores, index, thresholds)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda s, t, index=index: ordinal_loss(s, index, t), (scores, thresholds))
