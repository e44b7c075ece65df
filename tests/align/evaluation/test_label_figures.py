"""Figures of classifiers and regression models against their definitions, and the coverage of their intervals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from align.evaluation.label_figures import bootstrap, class_figures, number_figures

NAMES = ("bad", "fair", "good")


def slow_class_figures(targets: list[int], predicted: list[int], classes: int) -> dict[str, Any]:
    """The definitions, row by row; None where undefined."""
    rows = list(zip(targets, predicted, strict=True))
    by_class = []
    for number in range(classes):
        both = sum(true == guess == number for true, guess in rows)
        guessed = sum(guess == number for guess in predicted)
        of_class = sum(true == number for true in targets)
        precision = both / guessed if guessed else None
        recall = both / of_class if of_class else None
        f1 = None
        if guessed or of_class:
            f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
        by_class.append((precision, recall, f1))
    macro = []
    for column in zip(*by_class, strict=True):
        defined = [value for value in column if value is not None]
        macro.append(sum(defined) / len(defined))
    return {"accuracy": sum(t == g for t, g in rows) / len(rows), "by_class": by_class, "macro": macro}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_figures_of_classes_are_those_of_the_definitions(rows: list[tuple[int, int]]) -> None:
    targets, predicted = [true for true, _ in rows], [guess for _, guess in rows]
    figures = class_figures(np.array(targets), np.array(predicted), NAMES)
    expected = slow_class_figures(targets, predicted, 3)
    assert figures["accuracy"] == pytest.approx(expected["accuracy"])
    assert [figures[f"{name}_macro"] for name in ("precision", "recall", "f1")] == pytest.approx(expected["macro"])
    for name, values in zip(NAMES, expected["by_class"], strict=True):
        for figure, value in zip(("precision", "recall", "f1"), values, strict=True):
            own = figures["by_class"][name]
            assert own.get(figure) == (None if value is None else pytest.approx(value))
            if value is not None:
                low, high = own[f"{figure}_low"], own[f"{figure}_high"]
                assert 0 <= low <= high <= 1


def test_the_confusion_matrix_has_a_row_per_true_class() -> None:
    figures = class_figures(np.array([0, 0, 0, 1, 2]), np.array([0, 1, 1, 1, 0]), NAMES)
    assert figures["confusion"] == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert [own["rows"] for own in figures["by_class"].values()] == [3, 1, 1]
    assert "precision" not in figures["by_class"]["good"]  # it is never predicted
    assert figures["by_class"]["good"]["recall"] == 0


numbers = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=20)


@given(numbers)
def test_figures_of_numbers_are_those_of_the_definitions(rows: list[tuple[float, float]]) -> None:
    targets = np.array([round(true, 2) for true, _ in rows])
    predicted = np.array([round(guess, 2) for _, guess in rows])
    figures = number_figures(targets, predicted)
    errors = [guess - true for true, guess in zip(targets, predicted, strict=True)]
    assert figures["rmse"] == pytest.approx(math.sqrt(sum(error**2 for error in errors) / len(errors)))
    assert figures["mae"] == pytest.approx(sum(map(abs, errors)) / len(errors))
    if len(set(targets)) == 1 or len(set(predicted)) == 1:
        assert "pearson" not in figures
        assert "spearman" not in figures
    else:
        assert figures["pearson"] == pytest.approx(pearsonr(targets, predicted).statistic, abs=1e-9)
        assert figures["spearman"] == pytest.approx(spearmanr(targets, predicted).statistic, abs=1e-9)


def test_a_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, size=400)

    def means(generator: np.random.Generator, count: int) -> Any:
        return values[generator.integers(400, size=(count, 400))].mean(-1, keepdims=True)

    low, high = bootstrap(means, 400)
    error = values.std() / math.sqrt(len(values))
    assert low[0] == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high[0] == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def covered(draw: Callable[[np.random.Generator, int], dict[str, Any]], name: str, truth: float) -> float:
    """Share of samples of 100 rows whose interval of a figure has its true value."""
    hits = 0
    for seed in range(60):
        figures = draw(np.random.default_rng(seed), 100)
        hits += figures[f"{name}_low"] <= truth <= figures[f"{name}_high"]
    return hits / 60


def draw_classes(generator: np.random.Generator, rows: int) -> dict[str, Any]:
    """Two classes, of which 80 % are predicted right."""
    targets = generator.integers(2, size=rows)
    wrong = generator.random(rows) < 0.2
    return class_figures(targets, np.where(wrong, 1 - targets, targets), ("no", "yes"))


def draw_numbers(generator: np.random.Generator, rows: int) -> dict[str, Any]:
    """Numbers of standard deviation 1, predicted with a correlation of 0.6."""
    predicted = generator.normal(size=rows)
    targets = 0.6 * predicted + 0.8 * generator.normal(size=rows)
    return number_figures(targets, predicted)


@pytest.mark.parametrize(
    ("draw", "name", "truth"),
    [
        (draw_classes, "accuracy", 0.8),
        (draw_classes, "f1_macro", 0.8),
        (draw_numbers, "rmse", math.sqrt(0.4**2 + 0.8**2)),
        (draw_numbers, "pearson", 0.6),
        (draw_numbers, "spearman", 6 / math.pi * math.asin(0.3)),
    ],
)
def test_intervals_have_the_truth_as_often_as_they_say(
    draw: Callable[[np.random.Generator, int], dict[str, Any]], name: str, truth: float
) -> None:
    assert 0.86 <= covered(draw, name, truth) <= 1.0
