"""The evaluation of a classifier or regression model on held-out texts, written to `classifier/` by the stage."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.data.labels import Classes, LabelledText, LabelSpace, Numbers
from align.evaluation.label_figures import class_figures, number_figures
from align.evaluation.reward_model import MAX_WORST
from align.roles.text_classifier import TextClassifier
from policies.text.tokenization import prompt_text

Evaluated = tuple[dict[str, Any], list[dict[str, Any]]]
"""The figures of `diagnostics.json`, and the worst errors in full."""

IN_DIAGNOSTICS = ("confusion", "baseline", "log_loss")
"""What is in `diagnostics.json` alone, and not in `evaluation.json`."""


def evaluate_classifier(
    model: TextClassifier, heldout: Sequence[LabelledText], trained: Sequence[LabelledText]
) -> Evaluated:
    """Evaluate a model on held-out texts.

    Args:
        model: The model.
        heldout: The held-out texts; at least one.
        trained: The training texts, to which the baseline is fitted.
    """
    outputs = model.outputs([text.ids for text in heldout])
    return compare_labels(outputs, model.space, heldout, trained)


def compare_labels(
    outputs: Tensor, space: LabelSpace, heldout: Sequence[LabelledText], trained: Sequence[LabelledText]
) -> Evaluated:
    """Compare the outputs `[N, C]` of a model with the labels of N held-out texts; see `evaluate_classifier`."""
    if isinstance(space, Classes):
        return _compare_classes(outputs.double(), space, heldout, trained)
    return _compare_numbers(outputs.double(), space, heldout)


def _compare_classes(
    logits: Tensor, space: Classes, heldout: Sequence[LabelledText], trained: Sequence[LabelledText]
) -> Evaluated:
    """Figures of logits `[N, C]`. The baseline is the most frequent class of the training texts."""
    targets = torch.tensor(space.targets(heldout))  # [N]
    predicted = logits.argmax(-1)  # [N]
    logprobs = logits.log_softmax(-1)  # [N, C]
    likelihoods = logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # [N]
    counts = Counter(space.targets(trained))
    most_frequent = max(counts, key=lambda number: counts[number])
    figures = {"task": "classification"} | class_figures(targets.numpy(), predicted.numpy(), space.names)
    figures["log_loss"] = -float(likelihoods.mean())
    figures["baseline"] = {
        "predicts": space.names[most_frequent],
        "accuracy": float((targets == most_frequent).double().mean()),
    }
    worst = []
    for index in likelihoods.argsort()[:MAX_WORST].tolist():
        number = int(predicted[index])
        if number != targets[index]:
            probabilities = {
                "probability": float(likelihoods[index].exp()),
                "of_predicted": float(logprobs[index].max().exp()),
            }
            worst.append(_error(heldout[index], space.labels[number]) | probabilities)
    return figures, worst


def _compare_numbers(outputs: Tensor, space: Numbers, heldout: Sequence[LabelledText]) -> Evaluated:
    """Figures of outputs `[N, 1]`. The baseline is the mean of the training labels."""
    targets = torch.tensor([float(text.label) for text in heldout], dtype=torch.float64)  # [N]
    predicted = space.mean + space.std * outputs.squeeze(-1)  # [N]
    baseline = number_figures(targets.numpy(), np.full(len(targets), space.mean))
    figures = {"task": "regression"} | number_figures(targets.numpy(), predicted.numpy())
    figures["baseline"] = {"predicts": space.mean, "rmse": baseline["rmse"], "mae": baseline["mae"]}
    errors = (predicted - targets).abs()  # [N]
    worst = []
    for index in errors.argsort(descending=True)[:MAX_WORST].tolist():
        worst.append(_error(heldout[index], float(predicted[index])))
    return figures, worst


def _error(text: LabelledText, predicted: float | str) -> dict[str, Any]:
    return {"text": prompt_text(text.text), "label": text.label, "predicted": predicted}


def headline_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The classifier's part of `evaluation.json`."""
    return {name: value for name, value in figures.items() if name not in IN_DIAGNOSTICS}
