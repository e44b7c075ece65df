import math
from pathlib import Path
from typing import Any

from align.report.figures import (
    gain_figures,
    optimisation_figure,
    reliability_figure,
    training_sections,
    upstream_sections,
)
from tests.align.report.runs import record, step

BEST_OF = {"n": 2, "curve": [{"n": 1, "kl": 0.0, "score_mean": 0.0}, {"n": 2, "kl": 0.25, "score_mean": 0.5}]}


def test_figures_of_a_stage_have_their_x_axis_in_common(tmp_path: Path) -> None:
    run = record(tmp_path, [step(1, reward__mean=1.0), step(20, reward__mean=2.0), step(10, eval__win_rate=0.5)])
    (section,) = training_sections([run])
    assert len(section.figures) == 2
    assert all('data-x="1 20"' in figure.svg for figure in section.figures)


def test_a_panel_of_one_run_has_a_curve_per_metric(tmp_path: Path) -> None:
    run = record(tmp_path, [step(1, reward__mean=1.0, eval__score_mean=2.0)])
    (figure,) = training_sections([run])[0].figures
    assert [(curve.name, curve.last) for curve in figure.legend] == [("reward/mean", "1"), ("eval/score_mean", "2")]


def test_a_panel_of_two_runs_has_a_figure_per_metric_and_a_curve_per_run(tmp_path: Path) -> None:
    first = record(tmp_path / "first", [step(1, reward__mean=1.0, eval__score_mean=2.0)])
    second = record(tmp_path / "second", [step(1, reward__mean=3.0)])
    mean, score = training_sections([first, second])[0].figures
    assert mean.title == "Score: reward/mean"
    assert [(curve.name, curve.style, curve.last) for curve in mean.legend] == [("first", 0, "1"), ("second", 1, "3")]
    assert [curve.name for curve in score.legend] == ["first"]


def test_the_distance_is_the_root_of_the_kl(tmp_path: Path) -> None:
    metrics = [step(n, eval__kl_per_sequence=float(n * n), eval__score_mean=float(n)) for n in (1, 2)]
    figure = optimisation_figure(record(tmp_path, metrics, reference={"score_mean": 0.0}, best_of=BEST_OF))
    assert figure is not None
    assert [curve.name for curve in figure.legend] == ["score, PPO", "score, best of n"]
    assert [row.split("<td>") for row in figure.rows.split("<tr>")[1:]] == [
        ['<th scope="row">0', "0", "0"],
        ['<th scope="row">0.5', "", "0.5"],
        ['<th scope="row">1', "1", ""],
        ['<th scope="row">2', "2", ""],
    ]


def test_one_evaluation_is_too_little_for_a_curve(tmp_path: Path) -> None:
    run = record(tmp_path, [step(1, eval__kl_per_sequence=1.0, eval__score_mean=1.0)])
    assert optimisation_figure(run) is None


def test_a_kl_estimate_below_zero_counts_as_zero(tmp_path: Path) -> None:
    metrics = [step(n, eval__kl_per_sequence=-0.1 * n, eval__score_mean=float(n)) for n in (1, 2)]
    figure = optimisation_figure(record(tmp_path, metrics))
    assert figure is not None
    assert 'data-x="-1 1"' in figure.svg


def test_a_distribution_is_drawn_at_the_first_the_middle_and_the_last_step(tmp_path: Path) -> None:
    histogram = {"low": -0.5, "high": 1.5, "counts": [1, 3]}  # bins of width 1
    metrics = [step(number) | {"reward/histogram": histogram} for number in range(1, 6)]
    (section,) = training_sections([record(tmp_path, metrics)])
    (figure,) = section.figures
    assert (section.name, figure.name) == ("reward", "figure-reward-histogram")
    assert [(line.name, line.last) for line in figure.legend] == [(f"step {n}", "mean 0.75") for n in (1, 3, 5)]
    assert "<td>0.25" in figure.rows


def test_reliability_is_beside_the_diagonal() -> None:
    bins = [{"confidence": 0.55, "accuracy": 0.5, "pairs": 9}, {"confidence": 0.95, "accuracy": 0.9, "pairs": 3}]
    figure = reliability_figure({"reliability": bins})
    assert figure is not None
    assert 'class="diagonal"' in figure.svg
    assert reliability_figure({}) is None


def test_a_section_without_metrics_is_made_for_a_figure_alone(tmp_path: Path) -> None:
    (section,) = training_sections([record(tmp_path, best_of=BEST_OF)])
    assert (section.name, [figure.name for figure in section.figures]) == ("distance", ["figure-optimisation"])
    assert upstream_sections([record(tmp_path)]) == []


def test_a_curve_of_many_steps_is_thinned(tmp_path: Path) -> None:
    run = record(tmp_path, [step(n, reward__mean=math.sin(n)) for n in range(1, 1001)])
    assert 100 < training_sections([run])[0].figures[0].rows.count("<tr>") <= 400


def test_the_frontier_is_drawn_by_rising_kl_beside_the_policy_at_its_scales() -> None:
    def at(kl: float, gain: float) -> dict[str, Any]:
        return {"kl": kl, "score_gain": gain, "gold_gain": gain / 2}

    section = {
        "points": [at(0.1, 0.4), at(0.5, 0.9)],
        "best_of": [at(0.2, 0.5) | {"n": 2}],
        "policies": [
            at(1.5, 1.2) | {"scale": 1, "best": at(1.5, 1.4) | {"from": "policy"}},
            at(0.7, 0.8) | {"scale": 0.5, "best": at(0.7, 1.0) | {"from": "reference"}},
        ],
    }
    score, gold = gain_figures({"frontier": section})
    assert [entry.name for entry in score.legend] == ["best policy", "best of n", "policy, scaled"]
    assert [entry.last for entry in score.legend] == ["1", "0.5", "1.2"]
    assert [entry.last for entry in gold.legend] == ["0.5", "0.25", "0.6"]
    assert '<th scope="row">0.7<td>1<td><td>0.8' in score.rows
    assert list(gain_figures({})) == []


def test_without_a_gold_score_the_frontier_has_one_figure() -> None:
    section = {"points": [], "best_of": [], "policies": [{"scale": 1, "kl": 0.2, "score_gain": 0.1}]}
    (figure,) = gain_figures({"frontier": section})
    assert [entry.name for entry in figure.legend] == ["policy, scaled"]
