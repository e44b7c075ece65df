"""Distributions of numbers, as metrics of a run."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TypedDict

import numpy as np

MOST_BINS = 20
"""Most bins of a histogram."""
LEAST_RANGE = 1e-6
"""A range that is a smaller part of the numbers may be rounding."""


class Histogram(TypedDict):
    """How many numbers lie in each of some bins of equal width. A JSON value, as it stands in `metrics.jsonl`.

    Attributes:
        low: Where the first bin begins.
        high: Where the last bin ends.
        counts: How many numbers lie in each bin, from the lowest on.
    """

    low: float
    high: float
    counts: list[int]


MetricValue = float | Histogram
"""What a metric may be."""


def histogram_of(values: Sequence[float]) -> Histogram:
    """The distribution of at least one finite number, from the smallest to the largest.

    Numbers that differ by rounding alone are in one bin.
    """
    low = min(values)
    high = max(values)
    size = max(1.0, abs(low), abs(high))
    if high - low < LEAST_RANGE * size:
        low -= size / 2
        high += size  # not as far as below, where the numbers would lie on the edge of two bins
    return _histogram(values, low, high, MOST_BINS)


def histogram_of_integers(values: Sequence[int]) -> Histogram:
    """The distribution of at least one integer. Each bin has the same number of integers, in its middle."""
    low = min(values)
    span = max(values) - low + 1
    width = -(-span // MOST_BINS)
    bins = -(-span // width)
    return _histogram(values, low - 0.5, low - 0.5 + bins * width, bins)


def bin_edges(histogram: Histogram) -> list[float]:
    """Where its bins begin, and where the last one ends."""
    edges: list[float] = np.linspace(histogram["low"], histogram["high"], len(histogram["counts"]) + 1).tolist()
    return edges


def bin_middles(histogram: Histogram) -> list[float]:
    """The middle of each bin."""
    return [(low + high) / 2 for low, high in pairwise(bin_edges(histogram))]


def bin_densities(histogram: Histogram) -> list[tuple[float, float]]:
    """The middle of each bin, and the share of the numbers that lie in it by its width."""
    counts = histogram["counts"]
    width = (histogram["high"] - histogram["low"]) / len(counts)
    return [(middle, count / sum(counts) / width) for middle, count in zip(bin_middles(histogram), counts, strict=True)]


def mean_of_bins(histogram: Histogram) -> float:
    """The mean of the numbers, each taken as the middle of its bin."""
    return float(np.average(bin_middles(histogram), weights=histogram["counts"]))


def _histogram(values: Sequence[float], low: float, high: float, bins: int) -> Histogram:
    counts, edges = np.histogram(values, bins, (low, high))
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
