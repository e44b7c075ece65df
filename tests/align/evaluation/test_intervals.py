"""Intervals hold what they say: about 95 % of simulated ones contain the true value."""

import math

import pytest
import torch
from torch import Tensor

from align.evaluation.intervals import mean_interval, ratio_interval, share_interval, with_interval
from align.evaluation.length_control import length_controlled_win_rate
from align.evaluation.policy import paired_gain
from rewards.diagnostics import accuracy, wilson

TRIALS = 2000
SIZES = [64, 256, 1024]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covered(ends: list[tuple[float, float]], truth: float) -> float:
    return sum(low <= truth <= high for low, high in ends) / len(ends)


def exponential(*shape: int) -> Tensor:
    """Skewed values with mean 1."""
    return -torch.rand(shape, generator=generator(), dtype=torch.float64).clamp_min(1e-12).log()


@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_a_mean_covers_it(rows: int) -> None:
    ends = [mean_interval(values) for values in exponential(TRIALS, rows)]
    assert 0.93 <= covered(ends, 1.0) <= 0.97  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_a_paired_difference_covers_it(rows: int) -> None:
    shared = torch.randn(TRIALS, rows, generator=generator(1), dtype=torch.float64) * 3
    policy = shared + exponential(TRIALS, rows)
    ends = []
    for ours, theirs in zip(policy, shared, strict=True):
        gain = paired_gain(ours, theirs, "score")
        ends.append((gain["score_gain_low"], gain["score_gain_high"]))
    assert 0.93 <= covered(ends, 1.0) <= 0.97


@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_a_ratio_covers_it(rows: int) -> None:
    """Long documents have fewer nats per token, as they have more context."""
    sizes = (50 + 200 * torch.rand(TRIALS, rows, generator=generator(9), dtype=torch.float64)).round()
    totals = sizes * (3 + exponential(TRIALS, rows)) - 0.002 * sizes**2
    mean, variance = 150.0, 200**2 / 12
    truth = 4 - 0.002 * (variance + mean**2) / mean
    ends = [ratio_interval(*trial) for trial in zip(totals, sizes, strict=True)]
    assert 0.93 <= covered(ends, truth) <= 0.97  # type: ignore[arg-type]


@pytest.mark.parametrize("chance", [0.15, 0.5, 0.8])
@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_a_share_covers_it(rows: int, chance: float) -> None:
    trials = (torch.rand(TRIALS, rows, generator=generator(2), dtype=torch.float64) < chance).double()
    ends = [share_interval(values) for values in trials]
    assert 0.93 <= covered([(e.accuracy_low, e.accuracy_high) for e in ends], chance) <= 0.97


@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_a_win_rate_with_ties_covers_it(rows: int) -> None:
    draws = torch.rand(TRIALS, rows, generator=generator(3), dtype=torch.float64)
    wins = (draws < 0.5).double() + 0.5 * ((draws >= 0.5) & (draws < 0.7)).double()  # 50 % won, 20 % tied
    ends = [share_interval(values) for values in wins]
    assert 0.93 <= covered([(e.accuracy_low, e.accuracy_high) for e in ends], 0.6) <= 0.97


@pytest.mark.parametrize("rows", SIZES)
def test_the_interval_of_an_accuracy_of_clustered_comparisons_covers_it(rows: int) -> None:
    """Comparisons of one prompt are right together: 4 per prompt, each copies the first with probability one half."""
    first = torch.rand(TRIALS // 4, rows // 4, 1, generator=generator(4), dtype=torch.float64)
    own = torch.rand(TRIALS // 4, rows // 4, 4, generator=generator(5), dtype=torch.float64)
    copied = torch.rand(TRIALS // 4, rows // 4, 4, generator=generator(6)) < 0.5
    differences = 0.7 - torch.where(copied, first, own).flatten(1)  # right with probability 0.7
    clusters = [index // 4 for index in range(rows)]
    ends = []
    for difference in differences:
        figures = accuracy(difference, clusters)
        ends.append((figures.accuracy_low, figures.accuracy_high))
    assert 0.92 <= covered(ends, 0.7) <= 0.98  # fewer trials: each takes longer


@pytest.mark.parametrize("rows", [64, 256])
def test_the_interval_of_a_length_controlled_win_rate_covers_it(rows: int) -> None:
    theta = 0.4
    longer = torch.randn(500, rows, generator=generator(7), dtype=torch.float64) * 10 + 3
    scaled = torch.tanh(longer / longer.std(dim=1, correction=0, keepdim=True))
    wins = torch.rand(500, rows, generator=generator(8), dtype=torch.float64) < (theta + 1.5 * scaled).sigmoid()
    ends = []
    for won, difference in zip(wins, longer, strict=True):
        figures = length_controlled_win_rate(won, difference)
        assert figures is not None
        ends.append((figures.low, figures.high))
    truth = 1 / (1 + math.exp(-theta))
    assert 0.92 <= covered(ends, truth) <= 0.98


def test_a_model_that_wins_by_length_alone_wins_half_at_equal_length() -> None:
    """Both lengths win σ(±2) of their comparisons; the model's responses are longer three times out of four."""
    wins = torch.tensor([1.0] * 66 + [0.0] * 9 + [1.0] * 3 + [0.0] * 22)
    longer = torch.tensor([10.0] * 75 + [-10.0] * 25)
    figures = length_controlled_win_rate(wins, longer)
    assert figures is not None
    assert float(wins.mean()) == pytest.approx(0.69)
    assert figures.win_rate == pytest.approx(0.5, abs=0.01)
    assert figures.low < figures.win_rate < figures.high


def test_swapped_models_have_opposite_length_controlled_win_rates() -> None:
    wins = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.0])
    longer = torch.tensor([5.0, -3.0, 2.0, -7.0, 1.0, 4.0, 3.0, 2.0])
    ours = length_controlled_win_rate(wins, longer)
    theirs = length_controlled_win_rate(1 - wins, -longer)
    assert ours is not None
    assert theirs is not None
    assert ours.win_rate + theirs.win_rate == pytest.approx(1)
    assert ours.low + theirs.high == pytest.approx(1)


@pytest.mark.parametrize(
    ("wins", "longer"),
    [
        ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, -1.0, 3.0]),  # always won
        ([1.0, 1.0, 0.0, 0.0], [1.0, 2.0, -1.0, -3.0]),  # the longer one always wins
        ([1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]),  # lengths do not differ
    ],
)
def test_there_is_no_length_controlled_win_rate_without_a_maximum(wins: list[float], longer: list[float]) -> None:
    assert length_controlled_win_rate(torch.tensor(wins), torch.tensor(longer)) is None


def test_a_share_of_zeros_and_ones_has_the_interval_of_wilson() -> None:
    values = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert share_interval(values) == wilson(0.75, 4)
    assert share_interval(torch.ones(4)) == wilson(1.0, 4)


def test_one_value_has_no_interval() -> None:
    assert with_interval("score", torch.tensor([2.0])) == {"score": 2.0}
