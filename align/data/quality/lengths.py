"""How long the rows are, and which are too long or far longer or shorter than the others."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from align.data.quality.check import FEWEST_ROWS, Flagged, flagged_by_reason
from align.data.quality.corpus import Corpus

FENCE = 3.0
"""Outliers are so many interquartile ranges beyond the quartiles, of the logarithms of the lengths (Tukey 1977)."""
LONGER_BY = 4.0
SHORTER_BY = 20.0
"""However alike the lengths are, an outlier is longer or shorter than the quartile by this factor.

Texts of one word occur among others everywhere.
"""
QUANTILES = {"p5": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}


def find_outlier_lengths(corpus: Corpus) -> Flagged | None:
    """Rows longer than the limit, and rows with a prompt or response far longer or shorter than the others."""
    unit = corpus.unit
    reasons: dict[int, str] = {}
    if corpus.max_length is not None:
        for index, length in corpus.lengths.items():
            if length.row > corpus.max_length:
                reasons[index] = f"longer than {corpus.max_length:,} {unit}"
    for name, lengths in parts_by_row(corpus).items():
        if name == "row":
            continue
        low, high = usual_range(list(chain.from_iterable(lengths.values())))
        for index, each in lengths.items():
            if max(each) > high:
                reasons.setdefault(index, f"a {name} of more than {high:,.0f} {unit}, far more than others")
            elif 0 < min(each) < low:  # an empty one is a finding of its own
                reasons.setdefault(index, f"a {name} of fewer than {low:,.0f} {unit}, far fewer than others")
    return flagged_by_reason(reasons, "with an outlying length")


def usual_range(lengths: Sequence[int]) -> tuple[float, float]:
    """The least and the greatest usual length; no limits where there are too few to tell."""
    if len(lengths) < FEWEST_ROWS:
        return 0.0, float("inf")
    first, third = np.quantile(np.log(np.maximum(lengths, 1)), [0.25, 0.75])
    distance = FENCE * (third - first)
    low = first - max(distance, np.log(SHORTER_BY))
    high = third + max(distance, np.log(LONGER_BY))
    return float(np.exp(low)), float(np.exp(high))


def parts_by_row(corpus: Corpus) -> dict[str, dict[int, tuple[int, ...]]]:
    """The lengths of rows, prompts and responses by the index of the row, without parts that the rows do not have."""
    rows = {index: (length.row,) for index, length in corpus.lengths.items()}
    prompts = {index: (length.prompt,) for index, length in corpus.lengths.items() if corpus.contents[index].prompt}
    responses = {index: length.responses for index, length in corpus.lengths.items() if length.responses}
    parts: dict[str, dict[int, tuple[int, ...]]] = {}
    parts["row"] = dict(rows)
    parts["prompt"] = dict(prompts)
    parts["response"] = responses
    return {name: lengths for name, lengths in parts.items() if lengths}


def length_statistics(corpus: Corpus) -> dict[str, dict[str, Any]]:
    """Number, mean, extremes and quantiles of the lengths of rows, prompts and responses."""
    statistics: dict[str, dict[str, Any]] = {}
    for name, lengths in parts_by_row(corpus).items():
        statistics[name] = _statistics(list(chain.from_iterable(lengths.values())))
    return statistics


def _statistics(lengths: Sequence[int]) -> dict[str, Any]:
    quantiles = np.quantile(lengths, list(QUANTILES.values()), method="lower")
    named = {name: int(value) for name, value in zip(QUANTILES, quantiles, strict=True)}
    mean = round(float(np.mean(lengths)), 2)
    return {"count": len(lengths), "mean": mean, "min": min(lengths)} | named | {"max": max(lengths)}
