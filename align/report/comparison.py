"""What distinguishes runs: differences of their final evaluations, and the x axes over which their curves can stand."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from align.report.run_record import RunRecord
from align.report.svg import MAX_POINTS, x_axis
from align.runs.metric_catalogue import NATS_PER_SEQUENCE
from rewards.diagnostics import wilson

AXES = {"step": "step", "kl": f"KL, {NATS_PER_SEQUENCE}", "seconds": "seconds", "episodes": "episodes"}
"""The x axes of a comparison, and what they show."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """A cell of the table of evaluations.

    Attributes:
        text: What it says.
        is_clear: Whether it is a difference whose interval excludes zero.
    """

    text: str
    is_clear: bool = False


def difference(second: Estimate, first: Estimate) -> Estimate:
    """The second figure less the first, of independent samples.

    The interval follows from those of both (Zou and Donner 2008, "Construction of confidence limits about effect
    measures"); of two shares with Wilson's intervals it is Newcombe's.
    """
    value = second.value - first.value
    low = math.hypot(second.value - second.low, first.high - first.value)
    high = math.hypot(second.high - second.value, first.value - first.low)
    return Estimate(value, value - low, value + high)


def compared_evaluations(runs: Sequence[RunRecord]) -> list[tuple[str, list[Cell]]]:
    """The final evaluations: a label, the figure of each run, and its difference from the first for each later run."""
    rows = []
    for label, form, read in FIGURES_COMPARED:
        estimates = [read(run.evaluation) for run in runs]
        if any(estimate is not None for estimate in estimates):
            cells = [_cell(estimate, form) for estimate in estimates]
            cells += [_difference_cell(estimate, estimates[0], form) for estimate in estimates[1:]]
            rows.append((label, cells))
    return rows


def _gain(evaluation: Mapping[str, Any], name: str) -> Estimate | None:
    policy = evaluation.get("policy", {})
    if f"{name}_gain" not in policy:
        return None
    low = policy.get(f"{name}_gain_low", -math.inf)
    return Estimate(policy[f"{name}_gain"], low, policy.get(f"{name}_gain_high", math.inf))


def _wins(evaluation: Mapping[str, Any], name: str) -> Estimate | None:
    policy = evaluation.get("policy", {})
    if name not in policy:
        return None
    interval = wilson(policy[name], evaluation["prompts"])
    return Estimate(policy[name], interval.accuracy_low, interval.accuracy_high)


def _plain(evaluation: Mapping[str, Any], name: str) -> Estimate | None:
    """A figure whose interval is not known."""
    policy = evaluation.get("policy", {})
    return Estimate(policy[name], -math.inf, math.inf) if name in policy else None


def _accuracy(evaluation: Mapping[str, Any]) -> Estimate | None:
    measured = evaluation.get("reward_model")
    if not measured:
        return None
    return Estimate(measured["accuracy"], measured["accuracy_low"], measured["accuracy_high"])


def _cell(estimate: Estimate | None, form: str) -> Cell:
    return Cell("") if estimate is None else Cell(form.format(estimate.value))


def _difference_cell(estimate: Estimate | None, first: Estimate | None, form: str) -> Cell:
    """The difference from the first run; without an interval where one of them has none."""
    if estimate is None or first is None:
        return Cell("")
    signed = form.replace(":.", ":+.")
    change = difference(estimate, first)
    if not math.isfinite(change.high - change.low):
        return Cell(signed.format(change.value))
    text = f"{signed.format(change.value)} ({signed.format(change.low)} to {signed.format(change.high)})"
    return Cell(text, is_clear=change.low > 0 or change.high < 0)


FIGURES_COMPARED: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Estimate | None]], ...] = (
    ("change of the score", "{:+.3g}", partial(_gain, name="score")),
    ("change of the gold score", "{:+.3g}", partial(_gain, name="gold")),
    ("win rate by score", "{:.1%}", partial(_wins, name="win_rate")),
    ("win rate by gold score", "{:.1%}", partial(_wins, name="gold_win_rate")),
    ("accuracy of the reward model", "{:.1%}", _accuracy),
    ("KL, nats per sequence", "{:.3g}", partial(_plain, name="kl_per_sequence")),
    ("length, tokens", "{:.1f}", partial(_plain, name="length_mean")),
)
"""Label, format, and what reads it from an evaluation."""


def comparison_sentence(runs: Sequence[RunRecord]) -> str:
    """Which runs differ clearly from the first in what their responses are worth, and which have gone on since."""
    sentences = [_clear_differences(runs)]
    for run in runs:
        if run.is_extended:
            step = run.evaluation["policy"]["step"]
            sentences.append(f"{run.name} was evaluated at step {step:,} and has been extended since.")
    return " ".join(sentences)


def _clear_differences(runs: Sequence[RunRecord]) -> str:
    """Which runs differ clearly from the first, by the gold score where all have one."""
    for name, noun in (("gold", "gold score"), ("score", "score")):
        gains = [gain for run in runs if (gain := _gain(run.evaluation, name)) is not None]
        if len(gains) == len(runs):
            return _clear_gains(runs, gains, noun)
    return f"{len(runs)} runs, of which not all have been evaluated."


def _clear_gains(runs: Sequence[RunRecord], gains: Sequence[Estimate], noun: str) -> str:
    """Whose gain differs from that of the first run by more than chance."""
    clauses = []
    for run, gain in zip(runs[1:], gains[1:], strict=True):
        change = difference(gain, gains[0])
        if change.low > 0 or change.high < 0:
            side = "above" if change.value > 0 else "below"
            clauses.append(
                f"{run.name} changed the {noun} by {gain.value:+.3g}, {abs(change.value):.3g} {side} the "
                f"{gains[0].value:+.3g} of {runs[0].name}"
            )
    if not clauses:
        return f"No run changed the {noun} clearly more or less than {runs[0].name}."
    return "; ".join(clauses) + "."


def axes_data(runs: Sequence[RunRecord]) -> str:
    """What the script needs to draw the curves of PPO over another x axis, as JSON for a `<script>` element."""
    known = [_axes_of(run) for run in runs]
    ranges: dict[str, tuple[float, float]] = {}
    for axis in AXES:
        values: list[float] = []
        for run in known:
            values += run[axis]
        low = min(values, default=0.0)
        high = max(values, default=1.0)
        ranges[axis] = (low, high) if high > low else (low - 1, low + 1)
    markup = {axis: x_axis(ranges[axis], label) for axis, label in AXES.items()}
    data = {"runs": known, "ranges": ranges, "markup": markup}
    return json.dumps(data).replace("<", "\\u003c")


def _axes_of(run: RunRecord) -> dict[str, list[float]]:
    """The value of each axis at some steps of PPO, between which the script interpolates."""
    kl = run.history.values("ppo", "kl/per_sequence")
    step_seconds = run.history.values("ppo", "time/step")
    between = run.history.values("ppo", "time/between")
    batch_size = run.experiment.ppo.batch_size if run.experiment else 1
    seconds = 0.0
    newest_kl = 0.0
    rows: list[tuple[float, float, float, float]] = []
    for step in kl:
        seconds += (step_seconds.get(step) or 0.0) + (between.get(step) or 0.0)
        value = kl[step]
        newest_kl = newest_kl if value is None else value
        rows.append((step, round(newest_kl, 4), round(seconds, 2), step * batch_size))
    every = max(1, math.ceil(len(rows) / MAX_POINTS))
    axes: dict[str, list[float]] = {axis: [] for axis in AXES}
    for row in rows[::every] + rows[-1:]:
        for axis, value in zip(AXES, row, strict=True):
            axes[axis].append(value)
    return axes
