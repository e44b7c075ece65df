"""The weighted score of the subset Ties of RewardBench 2, from the scores of right and wrong responses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.evaluation.label_figures import Floats, Integers, bootstrap

PART_WEIGHTS = {
    "one_right_accuracy": 0.3,
    "several_right_accuracy": 0.3,
    "margin_preferred": 0.2,
    "margin_preferred_hard": 0.2,
    "margin": 0.01,
}
"""The weight of each part of the score in the authors' code (`process_single_model` of rewardbench)."""


@dataclass(frozen=True)
class TiesPair:
    """Two prompts of the subset on one matter.

    Attributes:
        one_right_gap: Where one response is right: its score less the highest of a wrong one.
        several_right_gap: Where several are right: the lowest score of a right one less the highest of a wrong one.
        spread: There, the highest score of a right one less the lowest.
    """

    one_right_gap: float
    several_right_gap: float
    spread: float


def paired(scored: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> list[TiesPair]:
    """The pairs of prompts that belong together.

    Args:
        scored: By id, `ref:N` where one response to prompt N is right and `tied:N` where several are, the scores of
            right and of wrong responses, at least one each. Other ids, and those without a partner, are left out.
    """
    pairs = []
    for name, (right, wrong) in scored.items():
        kind, _, number = name.partition(":")
        if kind != "ref" or f"tied:{number}" not in scored:
            continue
        tied_right, tied_wrong = scored[f"tied:{number}"]
        pair = TiesPair(
            one_right_gap=min(right) - max(wrong),
            several_right_gap=min(tied_right) - max(tied_wrong),
            spread=max(tied_right) - min(tied_right),
        )
        pairs.append(pair)
    return pairs


def ties_figures(pairs: Sequence[TiesPair]) -> dict[str, Any]:
    """The score of the subset (Malik et al. 2025, "RewardBench 2", as its code computes it).

    A right response must score higher than every wrong one, by more than right ones differ from each other.

    Args:
        pairs: M pairs of prompts, at least one.

    Returns:
        `score`, 0.3 · `one_right_accuracy` + 0.3 · `several_right_accuracy` + 0.2 · `margin_preferred` + 0.2 ·
        `margin_preferred_hard` + 0.01 · `margin`, from -0.01 to 1.01, and these parts; and `pairs`, M. With several
        pairs, `score_low` and `score_high` are the ends of a percentile interval of a bootstrap over the pairs.
    """
    one_right_gap = np.array([pair.one_right_gap for pair in pairs])  # [M]
    several_right_gap = np.array([pair.several_right_gap for pair in pairs])  # [M]
    spread = np.array([pair.spread for pair in pairs])  # [M]
    least = np.minimum(one_right_gap, several_right_gap)  # [M]
    with np.errstate(divide="ignore", invalid="ignore"):
        margins = np.nan_to_num(np.tanh(least / spread - 1))  # [M], 0 where gap and spread are 0
    by_part = {
        "one_right_accuracy": one_right_gap > 0,
        "several_right_accuracy": several_right_gap > 0,
        "margin_preferred": several_right_gap > spread,
        "margin_preferred_hard": least > spread,
        "margin": margins,
    }
    # The score is a sum of means, and so a mean over the pairs.
    scores: Floats = sum((weight * by_part[name] for name, weight in PART_WEIGHTS.items()), np.zeros(len(pairs)))
    figures: dict[str, Any] = {"score": float(scores.mean())}
    if len(pairs) > 1:
        low, high = bootstrap(lambda generator, count: _resampled_means(scores, generator, count), len(pairs))
        figures |= {"score_low": float(low[0]), "score_high": float(high[0])}
    return figures | {name: float(values.mean()) for name, values in by_part.items()} | {"pairs": len(pairs)}


def _resampled_means(scores: Floats, generator: np.random.Generator, count: int) -> Floats:
    """The mean score `[count, 1]` of samples of the pairs, drawn with replacement."""
    drawn: Integers = generator.integers(len(scores), size=(count, len(scores)))  # [count, M]
    return scores[drawn].mean(-1, keepdims=True)
