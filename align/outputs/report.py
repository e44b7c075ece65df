"""A run on one page: its curves as PNG files, its evaluation, and samples from its beginning and its end."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.evaluation.reward_model import RELIABILITY
from align.evaluation.tables import FIGURES
from align.runs.tracking import METRICS, SAMPLES, read_lines
from align.runtime.atomic_files import new_folder


@dataclass(frozen=True)
class Plot:
    """One picture: metrics of a stage over its steps."""

    name: str
    title: str
    stage: str
    metrics: tuple[str, ...]
    unit: str


PLOTS = (
    Plot("sft_loss", "SFT loss", "sft", ("sft/loss", "sft/heldout_loss"), "nats a token"),
    Plot(
        "reward_model_loss",
        "Reward model loss",
        "reward",
        ("reward_model/loss", "reward_model/heldout_loss"),
        "nats a row",
    ),
    Plot("reward", "Reward", "ppo", ("reward/mean", "eval/score_mean"), "score"),
    Plot("gold", "Gold score", "ppo", ("reward/gold_mean", "eval/gold_mean"), "gold score"),
    Plot("spread", "Spread of the ensemble", "ppo", ("reward/spread", "eval/spread_mean"), "score"),
    Plot("kl", "KL to the reference", "ppo", ("kl/per_sequence", "eval/kl_per_sequence"), "nats a sequence"),
    Plot("length", "Response length", "ppo", ("rollout/length_mean",), "tokens"),
    Plot("policy_loss", "Policy loss", "ppo", ("policy/loss",), "loss"),
    Plot("value_loss", "Value loss", "ppo", ("value/loss",), "loss"),
    Plot("entropy", "Entropy of the policy", "ppo", ("policy/entropy",), "nats a token"),
    Plot("clipping", "Share of clipped tokens", "ppo", ("policy/clip_fraction", "value/clip_fraction"), "share"),
    Plot("explained", "Explained variance of the critic", "ppo", ("value/explained_variance",), "share"),
    Plot("gap", "Sampler against learner", "ppo", ("rollout/mismatch_mean", "rollout/mismatch_max"), "nats a token"),
    Plot("time", "Time", "ppo", ("time/rollout", "time/score", "time/update", "time/sync"), "seconds a step"),
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem }
img { width: 100% } .text { white-space: pre-wrap }
"""


def write_report(run: Path, evaluation: dict[str, Any]) -> Path:
    """Draw what the run has logged so far into `report/`, whole or not at all. Returns the page's path."""
    metrics, samples = read_lines(run / METRICS), read_lines(run / SAMPLES)
    with new_folder(run / "report") as folder:
        drawn = [(plot.name, plot.title) for plot in PLOTS if draw(plot, metrics, folder / f"{plot.name}.png")]
        if draw_optimisation(metrics, evaluation, folder / "optimisation.png"):
            drawn.append(("optimisation", "Score against √KL"))
        if (run / "reward" / RELIABILITY).is_file():
            shutil.copyfile(run / "reward" / RELIABILITY, folder / RELIABILITY)
            drawn.append((Path(RELIABILITY).stem, "Reliability of the reward model"))
        (folder / "index.html").write_text(_page(run.name, drawn, evaluation, samples), encoding="utf-8")
    return run / "report" / "index.html"


def draw_optimisation(rows: Sequence[dict[str, Any]], evaluation: dict[str, Any], path: Path) -> bool:
    """Draw score, and gold score, against √KL: of the policy as PPO went on, and of the best of n SFT samples.

    Where the score still rises and the gold score falls, the policy has learned the reward model's mistakes (Gao et al.
    2023, "Scaling laws for reward model overoptimization"). Returns whether there is enough to draw.
    """
    kl = dict(_curve(rows, "ppo", "eval/kl_per_sequence"))
    best = evaluation.get("best_of", {}).get("curve", [])
    if len(kl) < 2 and not best:
        return False
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot()
    for key, label, colour in (("score_mean", "score", "tab:blue"), ("gold_mean", "gold score", "tab:orange")):
        points = sorted(
            (max(kl[step], 0.0) ** 0.5, value) for step, value in _curve(rows, "ppo", f"eval/{key}") if step in kl
        )
        if key in evaluation.get("reference", {}):
            points = [(0.0, evaluation["reference"][key]), *points]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=f"{label}, PPO")
        if own := [(point["kl"] ** 0.5, point[key]) for point in best if key in point]:
            axes.plot(*zip(*own, strict=True), color=colour, linestyle="--", marker="x", label=f"{label}, best of n")
    axes.set(title="Score against distance from the SFT model", xlabel="√KL, nats a sequence", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
    return True


def draw(plot: Plot, rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw a plot into a PNG file, unless none of its metrics was logged. Returns whether it did."""
    curves = {name: _curve(rows, plot.stage, name) for name in plot.metrics}
    curves = {name: curve for name, curve in curves.items() if curve}
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


def _curve(rows: Sequence[dict[str, Any]], stage: str, name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row["stage"] == stage and row.get(name) is not None]


def _page(
    name: str, plots: Sequence[tuple[str, str]], evaluation: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> str:
    images = "".join(f'<img src="{file}.png" alt="{title}">' for file, title in plots)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
        f"<h1>{escape(name)}</h1>{_evaluation(evaluation)}<h2>Curves</h2><div class=plots>{images}</div>"
        f"{_samples(samples)}</html>\n"
    )


def _evaluation(evaluation: dict[str, Any]) -> str:
    text = "<h2>Evaluation</h2>"
    if model := evaluation.get("reward_model"):
        text += (
            f"<p>Reward model: accuracy {model['accuracy']:.1%} on {model['pairs']:,} held-out pairs, "
            f"95 % interval {model['accuracy_low']:.1%} to {model['accuracy_high']:.1%}.</p>"
        )
    if "policy" not in evaluation:
        return text + "<p>PPO has not ended.</p>"
    reference, policy = evaluation["reference"], evaluation["policy"]
    rows = [
        [label, form.format(reference[key]) if key in reference else "", form.format(policy[key])]
        for key, label, form in FIGURES
        if key in policy
    ]
    prompts = f"{evaluation['prompts']} held-out prompts"
    return text + _table([prompts, "reference", f"policy of step {policy['step']}"], rows)


def _samples(samples: Sequence[dict[str, Any]]) -> str:
    ppo = [row for row in samples if row["stage"] == "ppo"]
    if not ppo:
        return ""
    first, last = ppo[0]["step"], ppo[-1]["step"]
    rows = [
        [str(row["step"]), row["prompt"], row["response"], f"{row['score']:.2f}"]
        for row in ppo
        if row["step"] in (first, last)
    ]
    return "<h2>Samples of the first and the last step</h2>" + _table(["step", "prompt", "response", "score"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} class=text>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
