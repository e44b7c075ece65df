import math
import random

import pytest
import torch

from rewards.diagnostics import (
    LengthModel,
    accuracy,
    accuracy_by,
    agreement,
    brier,
    calibration_error,
    comparisons,
    distribution,
    log_loss,
    reliability,
    wilson,
)
from rewards.preferences import Pair, PreferenceExample, Ranking, Rating


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_all_comparisons_of_pairs_and_rankings() -> None:
    examples = [
        PreferenceExample("p", ("a", "b"), Pair(margin=2.0, certainty=0.9)),
        PreferenceExample("p", ("a", "b"), Pair(certainty=0.5)),
        PreferenceExample("p", ("a", "b", "c", "d"), Ranking((1, 2, 1)), "kind"),
    ]
    result = comparisons(examples)
    assert [(c.better, c.worse) for c in result] == [
        ((0, 0), (0, 1)), ((2, 0), (2, 1)), ((2, 0), (2, 2)), ((2, 0), (2, 3)), ((2, 1), (2, 3)), ((2, 2), (2, 3)),
    ]  # fmt: skip
    assert (result[0].margin, result[0].certainty, result[1].attribute) == (2.0, 0.9, "kind")


def test_ratings_are_compared_in_pairs_and_none_twice() -> None:
    values = [1.0, 2.0, 2.0, 5.0, 3.0, 4.0, 1.0]
    result = comparisons([PreferenceExample("p", ("r",), Rating({"": value})) for value in values])
    examples = [example for c in result for example in (c.better[0], c.worse[0])]
    assert len(examples) == len(set(examples))
    assert all(values[c.better[0]] > values[c.worse[0]] for c in result)


def test_the_confidence_interval_has_its_coverage() -> None:
    pick, held = random.Random(0), 0
    for _ in range(400):
        right = sum(pick.random() < 0.8 for _ in range(60))
        interval = wilson(right / 60, 60)
        held += interval.accuracy_low <= 0.8 <= interval.accuracy_high
    assert 0.92 <= held / 400 <= 0.98


def test_correlated_errors_widen_the_interval() -> None:
    """Six comparisons in each of a hundred rankings, all right or all wrong, count as a hundred."""
    pick = random.Random(1)
    right = [1.0 if pick.random() < 0.7 else -1.0 for _ in range(100)]
    together = accuracy(
        doubles(*(value for value in right for _ in range(6))), [i for i in range(100) for _ in range(6)]
    )
    alone = accuracy(doubles(*right), list(range(100)))
    assert together.pairs == 600
    assert together.accuracy == alone.accuracy
    assert together.accuracy_low == pytest.approx(alone.accuracy_low, abs=1e-9)


def test_equal_scores_count_half() -> None:
    assert accuracy(doubles(1.0, 0.0, -1.0, 0.0), [0, 1, 2, 3]).accuracy == 0.5


def test_accuracy_of_no_comparisons() -> None:
    interval = accuracy(doubles(), [])
    assert (math.isnan(interval.accuracy), interval.accuracy_low, interval.accuracy_high, interval.pairs) == (
        True,
        0.0,
        1.0,
        0,
    )


def test_log_loss_and_brier_are_their_formulas() -> None:
    difference, certainty = doubles(2.0, -1.0), doubles(1.0, 0.8)
    probabilities = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert log_loss(difference, certainty) == pytest.approx(
        -(math.log(probabilities[0]) + 0.8 * math.log(probabilities[1]) + 0.2 * math.log(1 - probabilities[1])) / 2
    )
    assert brier(difference, certainty) == pytest.approx(
        ((probabilities[0] - 1) ** 2 + (probabilities[1] - 0.8) ** 2) / 2
    )


def test_preferences_drawn_from_the_models_probabilities_are_calibrated_and_doubled_scores_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.rand(20_000, generator=generator, dtype=torch.float64)
    right = torch.rand(20_000, generator=generator, dtype=torch.float64) < logits.sigmoid()
    difference = torch.where(right, logits, -logits)
    diagram = reliability(difference)
    assert calibration_error(diagram) < 0.01
    assert all(abs(row["confidence"] - row["accuracy"]) < 0.03 for row in diagram)
    assert sum(row["pairs"] for row in diagram) == 20_000
    assert calibration_error(reliability(2 * difference)) > 0.05


def test_accuracy_in_groups_by_a_value() -> None:
    values = doubles(*range(100))
    difference = torch.where(values < 40, 1.0, -1.0).double()
    result = accuracy_by(values, difference, list(range(100)))
    assert [row["accuracy"] for row in result] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert (result[0]["from"], result[0]["to"], result[0]["pairs"]) == (0.0, 19.0, 20)


def test_equal_values_are_in_the_same_group() -> None:
    result = accuracy_by(doubles(*[3.0] * 7), doubles(*[1.0] * 7), list(range(7)))
    assert [(row["from"], row["to"], row["pairs"]) for row in result] == [(3.0, 3.0, 7)]


def test_a_length_model_learns_that_medium_lengths_are_best() -> None:
    pick = random.Random(0)
    pairs = [sorted((pick.randrange(100), pick.randrange(100)), key=lambda n: abs(n - 50)) for _ in range(2000)]
    better, worse = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
    worth = LengthModel(better, worse)
    assert accuracy(worth(better) - worth(worse), list(range(2000))).accuracy > 0.85
    assert 0.4 < accuracy(better - worse, list(range(2000))).accuracy < 0.6


def test_agreement_is_a_mean_over_pairs_of_members() -> None:
    assert agreement(doubles(1, 1, -1, 1).repeat(3, 1)) == 1.0
    assert agreement(torch.stack([doubles(1, 1, 1, 1), doubles(1, 1, -1, -1)])) == 0.5


def test_a_distribution_by_its_quantiles() -> None:
    result = distribution(torch.arange(101.0))
    assert (result["mean"], result["q0"], result["q25"], result["q95"], result["q100"]) == (
        50.0,
        0.0,
        25.0,
        95.0,
        100.0,
    )
