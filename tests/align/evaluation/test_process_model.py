"""Figures of a process reward model, against counts by hand."""

import math

import pytest
import torch

from align.data.examples import TokenizedSteps
from align.evaluation.process_model import step_diagnostics
from align.evaluation.tables import diagnostics_table
from rewards.step_labels import LabelledSteps

HELDOUT = ((1.0, 1.0, 0.0), (1.0, 0.0, None), (1.0, 1.0), (0.0, None), (None, 0.0))
"""Labels of each response: of two the first error is at step 3 and 2, one has none, one begins with it, one is open."""
PROBABILITIES = (0.9, 0.8, 0.1, 0.7, 0.6, 0.9, 0.4, 0.2, 0.3)
"""Of the labelled steps: errors of judgement at the fifth (second response) and the seventh (third response)."""


def example(labels: tuple[float | None, ...]) -> TokenizedSteps:
    known = [label for label in labels if label is not None]
    steps = LabelledSteps("p", tuple(f"step {number}" for number in range(len(labels))), labels)
    return TokenizedSteps(steps, [1] * 9, 1, list(range(len(known))), known)


EXAMPLES = [example(labels) for labels in HELDOUT]
LOGITS = torch.tensor(PROBABILITIES).logit()


def test_steps_and_first_errors_are_counted() -> None:
    facts, worst = step_diagnostics(EXAMPLES, LOGITS, True, EXAMPLES[:1])
    assert (facts["rows"], facts["labelled_steps"]) == (5, 9)
    assert facts["accuracy"] == pytest.approx(7 / 9)
    assert facts["accuracy_low"] < 7 / 9 < facts["accuracy_high"]
    assert facts["right_steps"]["accuracy"] == pytest.approx(4 / 5)
    assert facts["wrong_steps"]["accuracy"] == pytest.approx(3 / 4)
    assert facts["baselines"]["constant"]["accuracy"] == pytest.approx(5 / 9)
    labels = [label for labels in HELDOUT for label in labels if label is not None]
    likelihoods = [p if label else 1 - p for p, label in zip(PROBABILITIES, labels, strict=True)]
    assert facts["log_loss"] == pytest.approx(-sum(map(math.log, likelihoods)) / 9, rel=1e-5)
    assert facts["brier"] == pytest.approx(sum((1 - p) ** 2 for p in likelihoods) / 9, rel=1e-5)
    first = facts["first_error"]
    assert (first["with_error"]["rows"], first["without_error"]["rows"]) == (3, 1)
    assert first["with_error"]["accuracy"] == pytest.approx(2 / 3)
    assert first["without_error"]["accuracy"] == 0.0
    assert first["f1"] == 0.0
    assert [error["step"] for error in worst[:2]] == ["step 1", "step 1"]
    assert (worst[0]["label"], worst[0]["predicted"]) == (0.0, pytest.approx(0.6))
    assert diagnostics_table(facts).row_count == 9


def test_f1_is_the_harmonic_mean_of_both_kinds_of_responses() -> None:
    better = LOGITS.clone()
    better[6] = 1.0
    facts, _ = step_diagnostics(EXAMPLES, better, True)
    assert facts["first_error"]["f1"] == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert "baselines" not in facts


def test_numbers_have_an_error_and_a_correlation() -> None:
    numbers = [example((3.0, -1.0)), example((2.0,))]
    facts, worst = step_diagnostics(numbers, torch.tensor([2.0, -1.0, 4.0]), False, numbers)
    assert facts["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert facts["rank_correlation"] == pytest.approx(0.5)
    assert facts["baselines"]["constant"]["rmse"] == pytest.approx(math.sqrt(26 / 9))
    assert worst[0]["predicted"] == 4.0
    assert diagnostics_table(facts).row_count == 3
