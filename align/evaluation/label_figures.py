"""Figures of classifiers and regression models on held-out rows, with 95 % intervals. Pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from rewards.diagnostics import wilson

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 1000
"""Bootstrap samples: the ends of an interval then vary by a few hundredths of its width."""
MAX_NUMBERS = 1_000_000
"""Numbers of bootstrap samples that are in memory at a time."""
LOW, HIGH = 2.5, 97.5
"""Percentiles at the ends of a 95 % interval."""
_MACRO = ("precision_macro", "recall_macro", "f1_macro")
"""Means over the classes, with equal weights."""
_ERRORS = ("rmse", "mae")
_CORRELATIONS = ("pearson", "spearman")


def class_figures(targets: Integers, predicted: Integers, names: Sequence[str]) -> dict[str, Any]:
    """Figures of predicted classes.

    Accuracy, precision and recall are shares, with Wilson's interval; F1 and the means over classes have percentile
    intervals of a bootstrap over the rows (Efron and Tibshirani 1993, section 13.3).

    Args:
        targets: The true class of each row `[N]`, from 0.
        predicted: The predicted class of each row `[N]`.
        names: The names of the C classes.

    Returns:
        `rows` and `accuracy`; `precision_macro`, `recall_macro` and `f1_macro`, means over the classes; `by_class` with
        `rows`, `precision`, `recall` and `f1` of each class by its name; and `confusion`, `[C][C]` counts with a row
        per true class. `…_low` and `…_high` are the ends of the intervals. What a class without rows, or without
        predictions, leaves undefined is missing.
    """
    classes = len(names)
    rows = len(targets)
    whole = np.bincount(targets * classes + predicted, minlength=classes**2).reshape(classes, classes)  # [C, C]

    def draw(generator: np.random.Generator, count: int) -> Floats:
        # The counts of rows that are drawn with replacement are multinomial.
        drawn = generator.multinomial(rows, whole.ravel() / rows, size=count)  # [count, C·C]
        confusions = drawn.reshape(count, classes, classes)
        return np.concatenate([_macro(confusions), _f1(confusions)], axis=-1)  # [count, 3 + C]

    low, high = bootstrap(draw, classes**2)
    f1 = _f1(whole)  # [C]
    figures: dict[str, Any] = {"rows": rows} | _share("accuracy", int(whole.trace()), rows)
    for name, *figure in zip(_MACRO, _macro(whole), low, high, strict=False):
        figures |= _figure(name, *figure)
    figures["by_class"] = {}
    for number, name in enumerate(names):
        right = int(whole[number, number])
        of_class = int(whole[number].sum())
        column = len(_MACRO) + number
        by_class: dict[str, Any] = {"rows": of_class}
        by_class |= _share("precision", right, int(whole[:, number].sum()))
        by_class |= _share("recall", right, of_class)
        by_class |= _figure("f1", f1[number], low[column], high[column])
        figures["by_class"][name] = by_class
    return figures | {"confusion": whole.tolist()}


def number_figures(targets: Floats, predicted: Floats) -> dict[str, Any]:
    """Figures of predicted numbers, with percentile intervals of a bootstrap over the rows.

    Args:
        targets: The true number of each row `[N]`.
        predicted: The predicted ones `[N]`.

    Returns:
        `rmse` and `mae`, the root of the mean squared error and the mean absolute error, in units of the labels; and
        the correlations `pearson` and `spearman`, which are missing where all labels or all predictions are equal.
        `…_low` and `…_high` are the ends of the intervals. Those of Spearman's keep the ranks of all rows.
    """
    rows = len(targets)
    errors = predicted - targets  # [N]

    def errors_of(sample: Integers) -> Floats:
        rmse = np.sqrt(np.square(errors[sample]).mean(-1))
        return np.stack([rmse, np.abs(errors[sample]).mean(-1)], axis=-1)

    figures: dict[str, Any] = {"rows": rows} | _resampled(_ERRORS, errors_of, rows)
    if np.ptp(targets) == 0 or np.ptp(predicted) == 0:
        return figures
    target_ranks = rankdata(targets)
    predicted_ranks = rankdata(predicted)

    def correlations_of(sample: Integers) -> Floats:
        pearson = _correlation(targets[sample], predicted[sample])
        return np.stack([pearson, _correlation(target_ranks[sample], predicted_ranks[sample])], axis=-1)

    return figures | _resampled(_CORRELATIONS, correlations_of, rows)


def _resampled(names: Sequence[str], figures_of: Callable[[Integers], Floats], rows: int) -> dict[str, float]:
    """Figures of all rows with their intervals. `figures_of` maps the rows `[…, N]` of samples to figures `[…, K]`."""

    def draw(generator: np.random.Generator, count: int) -> Floats:
        return figures_of(generator.integers(rows, size=(count, rows)))

    low, high = bootstrap(draw, rows)
    figures: dict[str, float] = {}
    for name, *figure in zip(names, figures_of(np.arange(rows)), low, high, strict=True):
        figures |= _figure(name, *figure)
    return figures


def bootstrap(draw: Callable[[np.random.Generator, int], Floats], size: int) -> tuple[Floats, Floats]:
    """95 % percentile intervals of figures, from samples that are drawn with a fixed seed.

    Args:
        draw: Draws a number of samples, and computes the K figures of each, `[count, K]`; NaN where undefined.
        size: Numbers that one sample takes in memory.

    Returns:
        The lower and the upper ends, `[K]` each; NaN where a figure is never defined.
    """
    generator = np.random.default_rng(0)
    at_a_time = max(1, MAX_NUMBERS // size)
    parts = [draw(generator, min(at_a_time, RESAMPLES - start)) for start in range(0, RESAMPLES, at_a_time)]
    values = np.concatenate(parts)  # [RESAMPLES, K]
    ends = np.full((2, values.shape[1]), np.nan)
    defined = ~np.isnan(values).all(0)  # [K]
    ends[:, defined] = np.nanpercentile(values[:, defined], (LOW, HIGH), axis=0)
    return ends[0], ends[1]


def _f1(confusion: Integers) -> Floats:
    """F1 `[…, C]` of each class, 2 · precision · recall / (precision + recall); NaN without rows and predictions."""
    right = _right(confusion)
    return _ratio(2 * right, confusion.sum(-2) + confusion.sum(-1))


def _macro(confusion: Integers) -> Floats:
    """Mean precision, recall and F1 over the classes that have them `[…, 3]`."""
    right = _right(confusion)
    precision = _ratio(right, confusion.sum(-2))
    recall = _ratio(right, confusion.sum(-1))
    return np.stack([np.nanmean(figure, axis=-1) for figure in (precision, recall, _f1(confusion))], axis=-1)


def _right(confusion: Integers) -> Integers:
    """The rows `[…, C]` of each class that are predicted right."""
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _ratio(counts: Integers, of: Integers) -> Floats:
    return np.divide(counts, of, out=np.full(counts.shape, np.nan), where=of > 0)


def _correlation(one: Floats, other: Floats) -> Floats:
    """Pearson's correlation along the last axis; NaN where all numbers of one side are equal."""
    one = one - one.mean(-1, keepdims=True)
    other = other - other.mean(-1, keepdims=True)
    norm = np.sqrt(np.square(one).sum(-1) * np.square(other).sum(-1))
    return np.divide((one * other).sum(-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def _share(name: str, count: int, of: int) -> dict[str, float]:
    """A share with its interval; nothing where it is undefined."""
    if not of:
        return {}
    interval = wilson(count / of, of)
    return _figure(name, interval.accuracy, interval.accuracy_low, interval.accuracy_high)


def _figure(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A figure with its interval; nothing where it is undefined."""
    if np.isnan(value):
        return {}
    return {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
