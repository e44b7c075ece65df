"""Accuracy and pass@k of rules, against all choices of samples and simulated intervals."""

from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.evaluation.rules import accuracy_gains, pass_at_k, rule_figures
from align.evaluation.tables import figure_rows
from rewards.diagnostics import wilson


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(1, 7))
def test_pass_at_k_is_the_share_of_choices_with_a_right_sample(right: list[bool], k: int) -> None:
    k = min(k, len(right))
    expected = fmean(any(choice) for choice in combinations(right, k))
    assert float(pass_at_k(torch.tensor(right).double()[:, None], k)) == pytest.approx(expected)


def test_one_sample_per_prompt_has_an_accuracy_with_the_interval_of_wilson() -> None:
    figures = rule_figures({"answer": torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)})
    expected = wilson(0.75, 4)
    assert figures == {
        "accuracy/answer": 0.75,
        "accuracy_low/answer": pytest.approx(expected.accuracy_low),
        "accuracy_high/answer": pytest.approx(expected.accuracy_high),
    }


def test_several_samples_have_pass_at_powers_of_two_and_at_all() -> None:
    right = torch.tensor([[1, 0], [0, 0], [0, 0], [1, 0], [0, 0], [0, 1]], dtype=torch.float64)  # [6, 2]
    figures = rule_figures({"answer": right})
    assert {name for name in figures if "_low" not in name and "_high" not in name} == {
        "accuracy/answer",
        "pass_at_2/answer",
        "pass_at_4/answer",
        "pass_at_6/answer",
    }
    assert figures["accuracy/answer"] == pytest.approx((2 / 6 + 1 / 6) / 2)
    assert figures["pass_at_2/answer"] == pytest.approx((1 - 6 / 15 + 1 - 10 / 15) / 2)
    assert figures["pass_at_6/answer"] == 1


def test_the_gain_is_paired_by_prompt() -> None:
    reference = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    policy = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    gains = accuracy_gains({"answer": policy}, {"answer": reference})
    assert gains["accuracy_gain/answer"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert gains["accuracy_gain_low/answer"] < gains["accuracy_gain/answer"] < gains["accuracy_gain_high/answer"]


def draws(trials: int, samples: int, prompts: int) -> tuple[Tensor, float, float]:
    """Right with a chance that differs from prompt to prompt, uniform in 0 to 1 squared; the mean, and pass@4."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(trials, 1, prompts, generator=generator, dtype=torch.float64) ** 2
    right = torch.rand(trials, samples, prompts, generator=generator, dtype=torch.float64) < chances
    none_of_four = 1 - 4 / 3 + 6 / 5 - 4 / 7 + 1 / 9  # E (1 - u²)⁴
    return right.double(), 1 / 3, 1 - none_of_four


@pytest.mark.parametrize("prompts", [64, 256])
def test_the_intervals_cover_the_truth_although_samples_of_a_prompt_are_alike(prompts: int) -> None:
    right, share, passes = draws(500, 8, prompts)
    covered: list[tuple[bool, bool]] = []
    for trial in right:
        figures = rule_figures({"a": trial})
        is_share = figures["accuracy_low/a"] <= share <= figures["accuracy_high/a"]
        covered.append((is_share, figures["pass_at_4_low/a"] <= passes <= figures["pass_at_4_high/a"]))
    for one in zip(*covered, strict=True):
        assert 0.92 <= fmean(one) <= 0.98


def test_the_terminal_names_the_terms() -> None:
    right = torch.tensor([[1, 0], [0, 0]], dtype=torch.float64)
    policy = rule_figures({"answer_low": right}) | accuracy_gains({"answer_low": right}, {"answer_low": right})
    rows = dict(figure_rows([rule_figures({"answer_low": right}), policy]))
    assert list(rows) == ["right by answer_low", "pass@2 by answer_low", "change of right by answer_low"]
    assert rows["pass@2 by answer_low"][0].startswith("50.0% (")
    assert rows["change of right by answer_low"] == ["", "+0.0% (+0.0% to +0.0%)"]
