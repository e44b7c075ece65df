"""Draw the recorded runs: of each sick run the metric that shows its cause, beside the quickstart as it should be.

    python experiments/sick_runs/draw.py

Reads `recorded.jsonl.gz` and writes docs/images/sick-runs.png.
"""

from pathlib import Path
from typing import Any

from make import CASES, RECORDED, read_recorded
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "sick-runs.png"
HEALTHY = "quickstart"
SHOWN = {
    "hacking": "eval/gold_mean",
    "length": "rollout/length_mean",
    "stale sampler": "rollout/mismatch_mean",
    "entropy": "policy/entropy",
    "strong KL": "eval/score_mean",
    "dead critic": "value/explained_variance",
    "truncated": "rollout/eos_share",
}
"""The metric in which to see each sick run."""
WITHOUT_HEALTHY = ("hacking",)
"""Runs that another gold score judges than the quickstart."""
COLUMNS = 4
Run = dict[str, Any]


def main() -> None:
    runs: list[Run] = read_recorded(RECORDED)
    figure = Figure(figsize=(11, 5), dpi=110, layout="constrained")
    grid = figure.subplots(2, COLUMNS).flat
    for axes, (name, metric) in zip(grid, SHOWN.items(), strict=False):
        others = [] if name in WITHOUT_HEALTHY else [run for run in runs if run["name"] == HEALTHY]
        draw(axes, others, metric, "tab:gray")
        draw(axes, [run for run in runs if run["name"] == name], metric, "tab:red")
        axes.set_title(CASES[name].cause, fontsize=9)
        axes.set_ylabel(metric, fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    explain(figure.axes[-1])
    figure.savefig(PICTURE)


def draw(axes: Axes, runs: list[Run], metric: str, colour: str) -> None:
    """A line for each seed."""
    for run in runs:
        points = [(line["step"], line[metric]) for line in run["metrics"] if line.get(metric) is not None]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1)


def explain(axes: Axes) -> None:
    """Use the place of the last panel for the legend."""
    axes.axis("off")
    axes.plot([], [], color="tab:red", label="sick, a line for each seed")
    axes.plot([], [], color="tab:gray", label="quickstart, the same seeds")
    axes.legend(loc="center", fontsize=9, frameon=False)


if __name__ == "__main__":
    main()
