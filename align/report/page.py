"""Writes a page about a run: its curves as PNG files, its evaluation, and samples of its first and last step."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.evaluation.reward_model import RELIABILITY
from align.evaluation.tables import figure_rows
from align.runs.tracking import METRICS, SAMPLES, read_lines
from align.runtime.atomic_files import new_folder

Line = dict[str, Any]
"""A line of `metrics.jsonl` or `samples.jsonl`."""


@dataclass(frozen=True)
class Plot:
    """Metrics of a stage over its steps, in one figure."""

    name: str
    title: str
    metrics: tuple[str, ...]
    unit: str
    stage: str = "ppo"


@dataclass(frozen=True)
class Image:
    """A PNG file of the page; `name` is its file name without suffix."""

    name: str
    title: str


PLOTS = (
    Plot("sft_loss", "SFT loss", ("sft/loss", "sft/heldout_loss"), "nats per token", stage="sft"),
    Plot(
        "reward_model_loss",
        "Reward model loss",
        ("reward_model/loss", "reward_model/heldout_loss"),
        "nats per example",
        stage="reward",
    ),
    Plot("reward", "Reward", ("reward/mean", "eval/score_mean"), "score"),
    Plot("gold", "Gold score", ("reward/gold_mean", "eval/gold_mean"), "gold score"),
    Plot("spread", "Spread of the ensemble", ("reward/spread", "eval/spread_mean"), "score"),
    Plot("kl", "KL to the reference", ("kl/per_sequence", "eval/kl_per_sequence"), "nats per sequence"),
    Plot("length", "Response length", ("rollout/length_mean",), "tokens"),
    Plot("policy_loss", "Policy loss", ("policy/loss",), "loss"),
    Plot("value_loss", "Value loss", ("value/loss",), "loss"),
    Plot("entropy", "Entropy of the policy", ("policy/entropy",), "nats per token"),
    Plot("clipping", "Share of clipped tokens", ("policy/clip_fraction", "value/clip_fraction"), "share"),
    Plot("explained", "Explained variance of the critic", ("value/explained_variance",), "share"),
    Plot(
        "mismatch",
        "Sampler–learner mismatch",
        ("rollout/mismatch_mean", "rollout/mismatch_max"),
        "nats per token",
    ),
    Plot("time", "Time", ("time/rollout", "time/score", "time/update", "time/sync"), "seconds per step"),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem }
img { width: 100% } .text { white-space: pre-wrap }
"""


def write_report(run: Path, evaluation: dict[str, Any]) -> Path:
    """Write `report/` of a run from what it has logged so far, replacing an earlier report.

    Args:
        run: The run's folder.
        evaluation: The contents of its `evaluation.json`.

    Returns:
        The path of `index.html`.
    """
    metrics = read_lines(run / METRICS)
    samples = read_lines(run / SAMPLES)
    with new_folder(run / "report") as folder:
        images = [Image(plot.name, plot.title) for plot in PLOTS if draw(plot, metrics, folder / f"{plot.name}.png")]
        if draw_optimisation(metrics, evaluation, folder / "optimisation.png"):
            images.append(Image("optimisation", "Score against √KL"))
        if (run / "reward" / RELIABILITY).is_file():
            shutil.copyfile(run / "reward" / RELIABILITY, folder / RELIABILITY)
            images.append(Image(Path(RELIABILITY).stem, "Reliability of the reward model"))
        (folder / "index.html").write_text(_page(run.name, images, evaluation, samples), encoding="utf-8")
    return run / "report" / "index.html"


def draw_optimisation(lines: Sequence[Line], evaluation: dict[str, Any], path: Path) -> bool:
    """Draw score and gold score against √KL: of the policy during PPO, and of the best of n SFT samples.

    Where the score still rises and the gold score falls, the policy exploits errors of the reward model (Gao et al.
    2023, "Scaling laws for reward model overoptimization"). Returns whether there was enough to draw.
    """
    kl = dict(_curve(lines, "ppo", "eval/kl_per_sequence"))
    best_of = evaluation.get("best_of", {}).get("curve", [])
    if len(kl) < 2 and not best_of:
        return False
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot()
    for key, label, colour in (("score_mean", "score", "tab:blue"), ("gold_mean", "gold score", "tab:orange")):
        points = _policy_points(_curve(lines, "ppo", f"eval/{key}"), kl)
        if key in evaluation.get("reference", {}):
            points = [(0.0, evaluation["reference"][key]), *points]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=f"{label}, PPO")
        if best_points := [(point["kl"] ** 0.5, point[key]) for point in best_of if key in point]:
            style: dict[str, Any] = {"color": colour, "linestyle": "--", "marker": "x"}
            axes.plot(*zip(*best_points, strict=True), **style, label=f"{label}, best of n")
    axes.set(title="Score against distance from the SFT model", xlabel="√KL, nats per sequence", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    return True


def _policy_points(curve: Sequence[tuple[int, float]], kl: Mapping[int, float]) -> list[tuple[float, float]]:
    """√KL and value at each step whose KL is known, by rising KL; estimates below 0 count as 0."""
    return sorted((max(kl[step], 0.0) ** 0.5, value) for step, value in curve if step in kl)


def draw(plot: Plot, lines: Sequence[Line], path: Path) -> bool:
    """Draw a plot into a PNG file unless none of its metrics was logged. Returns whether it did."""
    curves = {}
    for name in plot.metrics:
        if curve := _curve(lines, plot.stage, name):
            curves[name] = curve
    if not curves:
        return False
    figure = Figure(figsize=(5, 3), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot()
    for name, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=name, marker="o" if len(curve) < 8 else None, markersize=3, linewidth=1.2)
    axes.set(title=plot.title, xlabel="step", ylabel=plot.unit)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize=7)
    figure.savefig(path)
    return True


def _curve(lines: Sequence[Line], stage: str, metric: str) -> list[tuple[int, float]]:
    """Step and value of each line of the stage that has the metric."""
    return [(line["step"], line[metric]) for line in lines if line["stage"] == stage and line.get(metric) is not None]


def _page(name: str, images: Sequence[Image], evaluation: dict[str, Any], samples: Sequence[Line]) -> str:
    plots = "".join(f'<img src="{image.name}.png" alt="{image.title}">' for image in images)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
        f"<h1>{escape(name)}</h1>{_evaluation(evaluation)}<h2>Curves</h2><div class=plots>{plots}</div>"
        f"{_samples(samples)}</html>\n"
    )


def _evaluation(evaluation: dict[str, Any]) -> str:
    text = "<h2>Evaluation</h2>"
    if reward_model := evaluation.get("reward_model"):
        text += (
            f"<p>Reward model: accuracy {reward_model['accuracy']:.1%} on {reward_model['pairs']:,} held-out pairs, "
            f"95 % interval {reward_model['accuracy_low']:.1%} to {reward_model['accuracy_high']:.1%}.</p>"
        )
    if "policy" not in evaluation:
        return text + "<p>PPO has not ended.</p>"
    reference = evaluation["reference"]
    policy = evaluation["policy"]
    rows = [[label, *cells] for label, cells in figure_rows([reference, policy])]
    prompts = f"{evaluation['prompts']} held-out prompts"
    return text + _table([prompts, "reference", f"policy of step {policy['step']}"], rows)


def _samples(samples: Sequence[Line]) -> str:
    """The samples of the first and the last PPO step."""
    ppo = [sample for sample in samples if sample["stage"] == "ppo"]
    if not ppo:
        return ""
    shown_steps = (ppo[0]["step"], ppo[-1]["step"])
    rows = []
    for sample in ppo:
        if sample["step"] in shown_steps:
            rows.append([str(sample["step"]), sample["prompt"], sample["response"], f"{sample['score']:.2f}"])
    return "<h2>Samples of the first and the last step</h2>" + _table(["step", "prompt", "response", "score"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(_table_row(row, "td") for row in rows)
    return f"<table>{_table_row(header, 'th')}{body}</table>"


def _table_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag} class=text>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
