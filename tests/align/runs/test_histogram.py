"""Distributions of numbers as metrics."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.runs.histogram import MOST_BINS, bin_densities, bin_edges, histogram_of, histogram_of_integers, mean_of_bins

FLOATS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200)
INTEGERS = st.lists(st.integers(0, 500), min_size=1, max_size=200)


@given(FLOATS)
def test_every_number_is_counted_between_the_smallest_and_the_largest(values: list[float]) -> None:
    histogram = histogram_of(values)
    assert sum(histogram["counts"]) == len(values)
    assert histogram["low"] <= min(values) <= max(values) <= histogram["high"]


@given(INTEGERS)
def test_each_bin_has_the_same_number_of_integers(values: list[int]) -> None:
    histogram = histogram_of_integers(values)
    edges = bin_edges(histogram)
    width = round(edges[1] - edges[0])
    counted = Counter((value - min(values)) // width for value in values)
    assert len(histogram["counts"]) <= MOST_BINS
    assert histogram["counts"] == [counted[number] for number in range(len(histogram["counts"]))]


def test_few_integers_have_a_bin_each() -> None:
    assert histogram_of_integers([3, 5, 5, 6]) == {"low": 2.5, "high": 6.5, "counts": [1, 0, 2, 1]}
    assert bin_densities(histogram_of_integers([3, 5, 5, 6])) == [(3, 0.25), (4, 0), (5, 0.5), (6, 0.25)]
    assert mean_of_bins(histogram_of_integers([3, 5, 5, 6])) == 4.75


@given(FLOATS)
def test_the_area_under_a_density_is_one(values: list[float]) -> None:
    histogram = histogram_of(values)
    width = (histogram["high"] - histogram["low"]) / MOST_BINS
    assert sum(density for _, density in bin_densities(histogram)) * width == pytest.approx(1)


@pytest.mark.parametrize("value", [0.0, 2.0, -3e30])
def test_numbers_that_differ_by_rounding_are_in_one_bin(value: float) -> None:
    histogram = histogram_of([value, math.nextafter(value, math.inf), value])
    assert max(histogram["counts"]) == 3
    assert histogram["low"] < value < histogram["high"]
