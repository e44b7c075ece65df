"""The runs in a folder: where each of them is, and its newest figures."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.cells import cell_len
from rich.table import Table

from align.diagnosis.diagnose import verdicts
from align.diagnosis.run_figures import RunFigures, read_figures
from align.runs.folder import find_run
from align.runs.products import state_of
from align.runtime.consoles import escaped
from align.runtime.wording import clock
from policies.errors import UserError, first_line

LAST_STEPS = 10
"""Last steps whose mean time the rest of PPO is expected to take."""
SOMETIMES_SHOWN = ("score", "gold", "KL", "diagnosis")
"""Columns of the table that are left out where no run has anything in them."""
LEAST_WIDTH = 10
"""Characters of the column `diagnosis`, below which words would break."""
SHORTEST_NAME = 20
"""Characters of a name that are always in one line."""
OTHER_COLUMNS = 60
"""Characters that the other columns need."""


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance.

    Attributes:
        name: The name of its folder.
        state: `running`, `stopped`, `done` or `unreadable`.
        stage: The last stage that has logged anything.
        step: The last step that it has logged.
        steps: Steps of the stage in all, where the settings say so.
        score: Mean score of the last step of PPO.
        gold: Its mean gold score.
        kl: Its KL to the reference, in nats per sequence.
        seconds_left: How long the rest of PPO takes at its pace; None for a run that is not in PPO.
        verdict: The name of the most serious verdict of the diagnosis.
        updated: When it was last written to, in seconds since 1970.
        problem: Why it cannot be read.
    """

    name: str
    state: str
    stage: str | None = None
    step: int | None = None
    steps: int | None = None
    score: float | None = None
    gold: float | None = None
    kl: float | None = None
    seconds_left: float | None = None
    verdict: str | None = None
    updated: float | None = None
    problem: str | None = None


def list_runs(runs: Path) -> list[RunSummary]:
    """Summarise the runs in a folder, those written to last first.

    Raises:
        UserError: There is no such folder.
    """
    if not runs.is_dir():
        raise UserError(f"{runs} is not a folder: name the folder that holds the runs")
    found = [summarise(config.parent) for config in runs.glob("[!.]*/config.yaml")]
    return sorted(found, key=lambda run: run.updated or 0.0, reverse=True)


def summarise(folder: Path) -> RunSummary:
    """Summarise a run."""
    updated = max(path.stat().st_mtime for path in folder.iterdir())
    try:
        run, experiment = find_run(str(folder))
        figures = read_figures(folder)
    except UserError as error:
        return RunSummary(folder.name, "unreadable", updated=updated, problem=first_line(error))
    state = state_of(experiment, run)
    if not figures.lines:
        return RunSummary(folder.name, state, updated=updated)
    last = figures.lines[-1]
    steps = experiment.ppo.steps if last["stage"] == "ppo" else None
    left = None
    if state == "running" and steps:
        left = seconds_left(figures.curve("time/step").values, steps - last["step"])
    found = verdicts(figures)
    return RunSummary(
        name=folder.name,
        state=state,
        stage=last["stage"],
        step=last["step"],
        steps=steps,
        seconds_left=left,
        verdict=found[0].name if found else None,
        updated=updated,
        score=_of_last_step(figures, "reward/mean"),
        gold=_of_last_step(figures, "reward/gold_mean"),
        kl=_of_last_step(figures, "kl/per_sequence"),
    )


def seconds_left(step_seconds: Sequence[float], steps: int) -> float | None:
    """How long the remaining steps of PPO take at the pace of the last ones, without evaluations.

    Args:
        step_seconds: The seconds of each step so far; where there are none, nothing is known.
        steps: How many steps remain; less than 0 counts as 0.
    """
    return max(0, steps) * fmean(step_seconds[-LAST_STEPS:]) if step_seconds else None


def _of_last_step(figures: RunFigures, metric: str) -> float | None:
    """A metric at the last step of PPO; None where it is not finite there, or not logged."""
    curve = figures.curve(metric)
    last = max((line["step"] for line in figures.lines if line["stage"] == "ppo"), default=None)
    return curve.values[-1] if last is not None and curve.steps[-1:] == (last,) else None


def records(found: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """The runs as JSON values."""
    return [asdict(run) for run in found]


def runs_table(found: Sequence[RunSummary], width: int) -> Table:
    """The runs as a table for the terminal.

    Args:
        found: At least one run.
        width: The characters of a line. Longer names are folded, so that the other columns can be seen.
    """
    rows = [_cells(run) for run in found]
    shown = dict.fromkeys(_cells(RunSummary("", "")))
    for column in SOMETIMES_SHOWN:
        if not any(row[column] for row in rows):
            del shown[column]
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    name_width = min(max(cell_len(run.name) for run in found), max(SHORTEST_NAME, width - OTHER_COLUMNS))
    for column in shown:
        if column == "run":
            table.add_column(column, overflow="fold", width=max(name_width, len(column)))
        elif column == "diagnosis":
            table.add_column(column, overflow="fold", min_width=LEAST_WIDTH)
        else:
            table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(row[column] for column in shown))
    return table


def _cells(run: RunSummary) -> dict[str, str]:
    """The text of each column."""
    step = "" if run.step is None else f"{escaped(run.stage)} {run.step:,}"
    written = "" if run.updated is None else _ago(time.time() - run.updated)
    figures = {"score": run.score, "gold": run.gold, "KL": run.kl}
    return {
        "run": escaped(run.name),
        "state": run.state,
        "step": f"{step}/{run.steps:,}" if run.steps else step,
        **{column: "" if value is None else f"{value:.3g}" for column, value in figures.items()},
        "written": written if run.seconds_left is None else f"ETA {clock(run.seconds_left)}",
        "diagnosis": escaped(run.problem or run.verdict or ""),
    }


def _ago(seconds: float) -> str:
    """A time in the past in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"
