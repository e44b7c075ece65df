"""Diagnostics of a process reward model: how well it judges the labelled steps of held-out responses."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedSteps
from align.evaluation.reward_model import MAX_WORST
from policies.text.tokenization import prompt_text
from rewards import diagnostics as figures
from rewards.diagnostics import Accuracy
from rewards.step_labels import THRESHOLD, first_error

LABELLED_STEPS = "labelled_steps"
"""The key in `diagnostics.json` of the number of steps, in place of that of pairs."""


def step_diagnostics(
    examples: Sequence[TokenizedSteps],
    scores: Tensor,
    are_probabilities: bool,
    trained: Sequence[TokenizedSteps] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare a process reward model's scores with the labels of steps.

    Args:
        examples: Held-out responses.
        scores: Scores `[S]` of all their labelled steps, in order.
        are_probabilities: Whether σ of a score is the probability that the step is right; otherwise the score is the
            predicted label.
        trained: The training examples, by which the baseline is chosen.

    Returns:
        The figures of `diagnostics.json`, and the worst errors in full.
    """
    scores = scores.double()
    labels = _labels(examples)  # [S]
    facts: dict[str, Any] = {"rows": len(examples), LABELLED_STEPS: len(labels)}
    if are_probabilities:
        predicted = scores.sigmoid()  # [S]
        facts |= _probability_figures(examples, scores, labels) | _first_error_figures(examples, predicted)
        if trained:
            facts["baselines"] = {"constant": _of_steps(_constant_accuracy(examples, labels, _labels(trained)))}
    else:
        predicted = scores
        facts |= _number_figures(scores, labels)
        if trained:
            facts["baselines"] = {"constant": {"rmse": _rmse(labels, _labels(trained).mean())}}
    return facts, _worst_errors(examples, predicted, labels)


def _labels(examples: Sequence[TokenizedSteps]) -> Tensor:
    """The labels `[S]` float64 of all labelled steps."""
    labels: list[float] = []
    for example in examples:
        labels += example.labels
    return torch.tensor(labels, dtype=torch.float64)


def _rows(examples: Sequence[TokenizedSteps]) -> list[int]:
    """The row of each labelled step `[S]`: errors within a response are correlated."""
    rows: list[int] = []
    for row, example in enumerate(examples):
        rows += [row] * len(example.labels)
    return rows


def _of_steps(accuracy: Accuracy) -> dict[str, Any]:
    """An accuracy over steps, in the keys of reports."""
    facts = dict(vars(accuracy))
    facts[LABELLED_STEPS] = facts.pop("pairs")
    return facts


def _probability_figures(examples: Sequence[TokenizedSteps], scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy and calibration of logits `[S]`."""
    rows = _rows(examples)
    is_right = labels >= THRESHOLD  # [S]
    certainty = torch.where(is_right, labels, 1 - labels)  # [S], of the likelier judgement
    margin = torch.where(is_right, scores, -scores)  # [S], σ of it is the probability of that judgement
    reliability = figures.reliability(margin)
    facts = _of_steps(figures.accuracy(margin, rows)) | {
        "log_loss": figures.log_loss(margin, certainty),
        "brier": figures.brier(margin, certainty),
        "calibration_error": figures.calibration_error(reliability),
        "reliability": reliability,
    }
    for name, members in (("right_steps", is_right), ("wrong_steps", ~is_right)):
        chosen = members.nonzero().flatten().tolist()
        if chosen:
            facts[name] = _of_steps(figures.accuracy(margin[chosen], [rows[index] for index in chosen]))
    return facts


def _constant_accuracy(examples: Sequence[TokenizedSteps], labels: Tensor, trained: Tensor) -> Accuracy:
    """The accuracy of calling every step what most steps of the training data are."""
    most_are_right = bool((trained >= THRESHOLD).double().mean() >= 0.5)
    is_hit = (labels >= THRESHOLD) == most_are_right  # [S]
    return figures.accuracy(torch.where(is_hit, 1.0, -1.0), _rows(examples))


def _first_error_figures(examples: Sequence[TokenizedSteps], probabilities: Tensor) -> dict[str, Any]:
    """How often the first wrong step is found, or that there is none (Zheng et al. 2024, "ProcessBench").

    F1 is the harmonic mean of the shares among the responses with an error and among those without one.
    """
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for example, predicted in zip(examples, _by_step(examples, probabilities), strict=True):
        first = first_error(example.example.labels)
        if first is not None:
            hits[first >= 0].append(first_error(predicted) == first)
    facts: dict[str, Any] = {}
    for has_error, found in hits.items():
        if found:
            name = "with_error" if has_error else "without_error"
            share = figures.wilson(sum(found) / len(found), len(found))
            facts[name] = {"accuracy": share.accuracy, "accuracy_low": share.accuracy_low}
            facts[name] |= {"accuracy_high": share.accuracy_high, "rows": share.pairs}
    if len(facts) == 2:
        one, other = facts["with_error"]["accuracy"], facts["without_error"]["accuracy"]
        facts["f1"] = 2 * one * other / (one + other) if one + other else 0.0
    return {"first_error": facts} if facts else {}


def _by_step(examples: Sequence[TokenizedSteps], values: Tensor) -> Iterator[list[float | None]]:
    """The values `[S]` of labelled steps, by response and step; None for a step without a label."""
    remaining = iter(values.tolist())
    for example in examples:
        yield [None if label is None else next(remaining) for label in example.example.labels]


def _number_figures(scores: Tensor, labels: Tensor) -> dict[str, Any]:
    """Root of the mean squared error of predicted labels `[S]`, and Spearman's correlation with the labels."""
    facts: dict[str, Any] = {"rmse": _rmse(scores, labels)}
    if len(labels.unique()) > 1 and len(scores.unique()) > 1:
        facts["rank_correlation"] = figures.rank_correlation(scores.tolist(), labels.tolist())
    return facts


def _rmse(predicted: Tensor, labels: Tensor) -> float:
    return float((predicted - labels).square().mean().sqrt())


def _worst_errors(examples: Sequence[TokenizedSteps], predicted: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """The steps that are judged most wrong, worst first, with the text up to them."""
    places: list[tuple[TokenizedSteps, int]] = []
    for example in examples:
        for step, label in enumerate(example.example.labels):
            if label is not None:
                places.append((example, step))
    errors: list[dict[str, Any]] = []
    distance = (predicted - labels).abs()  # [S]
    for index in distance.argsort(descending=True, stable=True)[:MAX_WORST].tolist():
        example, step = places[index]
        error = {
            "label": float(labels[index]),
            "predicted": float(predicted[index]),
            "prompt": prompt_text(example.example.prompt),
            "before": "\n".join(example.example.steps[:step]),
            "step": example.example.steps[step],
        }
        errors.append(error)
    return errors
