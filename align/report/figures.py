"""The figures of a page: a chart, its legend with values, and the data behind it, for each panel of the catalogue."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from align.config.stage import Stage, all_stages
from align.report.run_record import MetricHistory, RunRecord
from align.report.svg import MAX_POINTS, STYLES, Chart, ChartLine, all_places, line_chart, thin
from align.runs.histogram import bin_densities, mean_of_bins
from align.runs.metric_catalogue import NATS_PER_SEQUENCE, SECTIONS, UPSTREAM, Panel, Section, find_metric, shown_in

NOT_FINITE = "–"


@dataclass(frozen=True)
class Legend:
    """A curve in words.

    Attributes:
        name: The name of the metric, or of the run.
        style: The number of its colour and dash.
        last: Its last value.
        meaning: What it is.
    """

    name: str
    style: int
    last: str
    meaning: str


@dataclass(frozen=True)
class Figure:
    """What the page shows of a chart.

    Attributes:
        name: The name of its anchor.
        title: Its heading.
        unit: The unit of its y axis.
        x_label: What its x axis shows.
        svg: The chart.
        legend: Its curves.
        rows: The rows of its table, as HTML.
        stage: The stage whose steps are its x axis; empty where it has another one.
    """

    name: str
    title: str
    unit: str
    x_label: str
    svg: str
    legend: tuple[Legend, ...]
    rows: str
    stage: str = ""


@dataclass(frozen=True)
class FigureSection:
    """The figures that answer one question."""

    name: str
    title: str
    question: str
    figures: tuple[Figure, ...]


def training_sections(runs: Sequence[RunRecord], limit: int = MAX_POINTS) -> list[FigureSection]:
    """The sections of PPO of which a run has logged anything.

    Args:
        runs: One run, whose metrics are the curves, or several, which are the curves themselves.
        limit: The most points of a curve.
    """
    sections = _sections(SECTIONS, runs, limit)
    if len(runs) > 1:
        return sections
    history = runs[0].history
    scores = distribution_figure(history, "reward/histogram", "Distribution of the scores", "score")
    tokens = distribution_figure(history, "rollout/length_histogram", "Distribution of the lengths", "tokens")
    sections = _with_figure(sections, "reward", scores)
    sections = _with_figure(sections, "text", tokens)
    sections = _with_figure(sections, "distance", optimisation_figure(runs[0]))
    for figure in gain_figures(runs[0].evaluation):
        sections = _with_figure(sections, "distance", figure)
    return sections


def upstream_sections(runs: Sequence[RunRecord], limit: int = MAX_POINTS) -> list[FigureSection]:
    """The sections of the stages before PPO, see `training_sections`."""
    sections = _sections(UPSTREAM, runs, limit)
    if len(runs) > 1:
        return sections
    return _with_figure(sections, "reward-model", reliability_figure(runs[0].diagnostics))


def _with_figure(sections: Sequence[FigureSection], name: str, figure: Figure | None) -> list[FigureSection]:
    """The sections, with one more figure at the end of one; the section is added where the run has logged nothing."""
    if figure is None:
        return list(sections)
    if all(section.name != name for section in sections):
        empty = next(section for section in (*UPSTREAM, *SECTIONS) if section.name == name)
        sections = [*sections, FigureSection(empty.name, empty.title, empty.question, ())]
    extended = []
    for section in sections:
        figures = (*section.figures, figure) if section.name == name else section.figures
        extended.append(replace(section, figures=figures))
    return extended


def _sections(sections: Sequence[Section], runs: Sequence[RunRecord], limit: int) -> list[FigureSection]:
    filled = []
    for section in sections:
        stage = next(stage for stage in all_stages() if stage.axis == section.axis)
        figures: list[Figure] = []
        for panel in section.panels:
            figures += _panel_figures(panel, stage, runs, limit)
        if figures:
            filled.append(FigureSection(section.name, section.title, section.question, tuple(figures)))
    return filled


def _panel_figures(panel: Panel, stage: Stage, runs: Sequence[RunRecord], limit: int) -> Iterator[Figure]:
    """A panel of one run in one figure, or of several in one figure for each metric."""
    x_range = _steps_range(stage.name, runs)
    for anchor, title, lines in _panel_lines(panel, stage.name, runs):
        drawn = thin([line for line in lines if line.finite], limit)
        if drawn:
            chart = Chart(
                name=f"figure-{anchor}",
                title=title,
                x_label="step",
                unit=panel.unit,
                lines=tuple(drawn),
                x_range=x_range,
            )
            yield make_figure(chart, stage.name)


def _panel_lines(panel: Panel, stage: str, runs: Sequence[RunRecord]) -> Iterator[tuple[str, str, list[ChartLine]]]:
    """Anchor, title and lines of each figure of a panel."""
    names = _logged_names(panel, stage, runs)
    if len(runs) == 1:
        metrics = [_metric_line(runs[0].history, stage, name) for name in names]
        yield panel.name, panel.title, _numbered(metrics)
        return
    for name in names:
        lines = [replace(_metric_line(run.history, stage, name), name=run.name) for run in runs]
        if len(names) == 1:
            yield panel.name, panel.title, _numbered(lines)
        else:
            yield f"{panel.name}-{anchor_of(name)}", f"{panel.title}: {name}", _numbered(lines)


def anchor_of(metric: str) -> str:
    """The name of a metric in letters that an identifier may have: the folder of a run may come from somebody else."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", metric)


def _numbered(lines: Iterable[ChartLine]) -> list[ChartLine]:
    """The lines, each with a style of its own."""
    return [replace(line, style=number, run=number) for number, line in enumerate(lines)]


def _logged_names(panel: Panel, stage: str, runs: Sequence[RunRecord]) -> list[str]:
    """The metrics of a panel that any of the runs has logged."""
    logged: dict[str, None] = {}
    for run in runs:
        logged |= dict.fromkeys(run.history.names(stage))
    return shown_in(panel, list(logged))


def _steps_range(stage: str, runs: Sequence[RunRecord]) -> tuple[float, float]:
    """From step 1 to the last of any run, which all figures of a stage have in common."""
    last = max(run.history.last_step(stage) or 1 for run in runs)
    return (1.0, float(last)) if last > 1 else (0.0, 2.0)


def _metric_line(history: MetricHistory, stage: str, name: str) -> ChartLine:
    values = history.values(stage, name)
    return ChartLine(name, tuple((float(step), value) for step, value in values.items()))


def make_figure(chart: Chart, stage: str = "") -> Figure:
    """A chart with its legend and its table.

    Args:
        chart: The chart.
        stage: The stage whose steps are its x axis; empty: it has another one.
    """
    legend = [_legend(curve) for curve in chart.lines]
    return Figure(
        name=chart.name,
        title=chart.title,
        unit=chart.unit,
        x_label=chart.x_label,
        svg=line_chart(chart),
        legend=tuple(legend),
        rows="".join(_table_rows(chart.lines)),
        stage=stage,
    )


def _legend(curve: ChartLine) -> Legend:
    metric = find_metric(curve.name)
    meaning = metric.meaning if metric else ""
    return Legend(curve.name, curve.style % STYLES, f"{curve.finite[-1][1]:.4g}", meaning)


def _table_rows(curves: Sequence[ChartLine]) -> Iterator[str]:
    """A row for each x, with the value of each curve there; the cell is empty where a curve has no point."""
    columns = [dict(curve.points) for curve in curves]
    for x in sorted(all_places(curves)):
        cells = "".join(f"<td>{_cell(column, x)}" for column in columns)
        yield f'<tr><th scope="row">{x:.9g}{cells}'


def _cell(column: Mapping[float, float | None], x: float) -> str:
    if x not in column:
        return ""
    value = column[x]
    return NOT_FINITE if value is None else escape(f"{value:.4g}")


def optimisation_figure(run: RunRecord) -> Figure | None:
    """Score and gold score against √KL: of the policy during PPO, and of the best of n SFT samples.

    Where the score still rises and the gold score falls, the policy exploits errors of the reward model (Gao et al.
    2023, "Scaling laws for reward model overoptimization"). None where there is too little to draw.
    """
    distances = _distances(run.history)
    best_of = run.evaluation.get("best_of", {}).get("curve", [])
    if len(distances) < 2 and not best_of:
        return None
    curves = []
    for style, (key, label) in enumerate((("score_mean", "score"), ("gold_mean", "gold score"))):
        policy = _policy_points(run, key, distances)
        best = [(math.sqrt(point["kl"]), point[key]) for point in best_of if key in point]
        curves.append(ChartLine(f"{label}, PPO", tuple(policy), 2 * style))
        curves.append(ChartLine(f"{label}, best of n", tuple(best), 2 * style + 1))
    drawn = tuple(curve for curve in curves if curve.finite)
    title = "Score against √KL"
    chart = Chart(
        name="figure-optimisation", title=title, x_label=f"√KL, {NATS_PER_SEQUENCE}", unit="score", lines=drawn
    )
    return make_figure(chart) if drawn else None


def gain_figures(evaluation: Mapping[str, Any]) -> Iterator[Figure]:
    """What the best policy at each KL, the best of n and the run's policy at its scales gain over the reference.

    A figure of the score, and one of the gold score; none where `align eval --frontier` has not measured them.
    """
    section = evaluation.get("frontier", {})
    policies = section.get("policies", [])
    best = list(section.get("points", []))
    # Points that only the policy's samples show are too far out to be joined with the others.
    best += [policy["best"] for policy in policies if policy.get("best", {}).get("from") == "reference"]
    rows = {"best policy": best, "best of n": section.get("best_of", []), "policy, scaled": policies}
    for key, label in (("score_gain", "score"), ("gold_gain", "gold score")):
        lines = [_gain_line(name, points, key, style) for style, (name, points) in enumerate(rows.items())]
        drawn = tuple(line for line in lines if line.finite)
        if drawn:
            yield make_figure(
                Chart(
                    name=f"figure-frontier-{key}",
                    title=f"Gain of the {label} against KL",
                    x_label=f"KL, {NATS_PER_SEQUENCE}",
                    unit=label,
                    lines=drawn,
                )
            )


def _gain_line(name: str, rows: Sequence[Mapping[str, float]], key: str, style: int) -> ChartLine:
    """The gains by rising KL, from the reference on."""
    points = sorted((row["kl"], row[key]) for row in rows if key in row)
    return ChartLine(name, ((0.0, 0.0), *points) if points else (), style)


def distribution_figure(history: MetricHistory, metric: str, title: str, x_label: str) -> Figure | None:
    """A distribution at the first, the middle and the last step of PPO; None where none is logged.

    Each step has bins of its own width. The figure shows densities, so that their areas are equal.

    Args:
        history: The metrics of a run.
        metric: The name of its histograms.
        title: What the figure shows.
        x_label: What is distributed.
    """
    histograms = history.histograms("ppo", metric)
    steps = list(histograms)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    if not chosen:
        return None
    lines = []
    for style, step in enumerate(chosen):
        lines.append(ChartLine(f"step {step}", tuple(bin_densities(histograms[step])), style))
    chart = Chart(f"figure-{anchor_of(metric)}", title, x_label, "density", tuple(lines))
    figure = make_figure(chart)
    legend = []
    for entry, step in zip(figure.legend, chosen, strict=True):
        legend.append(replace(entry, last=f"mean {mean_of_bins(histograms[step]):.4g}"))
    return replace(figure, legend=tuple(legend))


def _distances(history: MetricHistory) -> dict[int, float]:
    """√KL to the reference at each evaluation; estimates below 0 count as 0."""
    distances = {}
    for step, kl in history.values("ppo", "eval/kl_per_sequence").items():
        if kl is not None:
            distances[step] = math.sqrt(max(kl, 0.0))
    return distances


def _policy_points(run: RunRecord, key: str, distances: Mapping[int, float]) -> list[tuple[float, float | None]]:
    """√KL and value at each evaluation, from the reference on, by rising KL."""
    reference = run.evaluation.get("reference", {})
    points: list[tuple[float, float | None]] = []
    for step, value in run.history.values("ppo", f"eval/{key}").items():
        if step in distances and value is not None:
            points.append((distances[step], value))
    if points and key in reference:
        points.append((0.0, reference[key]))
    return sorted(points, key=lambda point: point[0])


def reliability_figure(diagnostics: Mapping[str, Any]) -> Figure | None:
    """How often the reward model is right where it is how sure; None where no comparisons were held out."""
    bins = diagnostics.get("reliability", [])
    points = tuple((interval["confidence"], interval["accuracy"]) for interval in bins)
    if not points:
        return None
    judged = "steps" if "labelled_steps" in diagnostics else "comparisons"
    line = ChartLine(f"held-out {judged}", tuple(sorted(points)))
    title = "Reliability"
    chart = Chart(
        name="figure-reliability",
        title=title,
        x_label="confidence",
        unit="share correct",
        lines=(line,),
        diagonal=True,
    )
    return make_figure(chart)
