"""Compare PPO against one reward model and against an ensemble of four by the quickstart's gold score.

    python experiments/quickstart/ensemble.py --run runs/quickstart --to runs/ensemble

Starts from the SFT model and the data of a finished quickstart run. Trains four reward models, runs PPO far from the
reference against the first alone and against all of them, and plots the gold scores against √KL beside best-of-n
sampling from the SFT model.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rerun import require_run

from align.config.load import load_experiment

MEMBERS = 4
PPO = {"steps": 24, "kl": {"coefficient": 0.01}}
"""A weak KL penalty, so that both policies move far enough to exploit errors of the reward model."""
EVALUATE_EVERY = 2
BEST_OF = 16

Point = dict[str, float]
"""`kl`, `score` and `gold` of one evaluation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/quickstart-ensemble.png"))
    parser.add_argument("--combine", default="mean_minus_std")
    arguments = parser.parse_args()
    require_run(arguments.run)
    arguments.to.mkdir(parents=True, exist_ok=True)
    single_curves: list[list[Point]] = []
    ensemble_curves: list[list[Point]] = []
    best: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        settings = {"members": MEMBERS, "combine": arguments.combine}
        ensemble = train(arguments, f"ensemble-{seed}", seed, {"ensemble": settings})
        first_member = {"model": str(ensemble / "reward"), "ensemble": {"members": 1}}
        single = train(arguments, f"one-{seed}", seed, first_member)
        single_curves.append(curve(single))
        ensemble_curves.append(curve(ensemble))
        best = json.loads((single / "evaluation.json").read_text())["best_of"]["curve"]
        compare(single_curves[-1], ensemble_curves[-1])
    draw({"one model": single_curves, f"ensemble of {MEMBERS}": ensemble_curves}, best, arguments.plot)


def train(arguments: argparse.Namespace, name: str, seed: int, reward: dict[str, Any]) -> Path:
    """Run the stages reward and PPO unless that run is already finished. Returns its folder."""
    folder: Path = arguments.to / name
    if not (folder / "evaluation.json").is_file():
        experiment = load_experiment(arguments.run / "config.yaml").model_dump(mode="json")
        experiment |= {"name": name, "runs": str(arguments.to), "seed": seed, "stages": ["reward", "ppo"]}
        experiment["sft"]["adapter"] = str(arguments.run / "sft")
        experiment["reward"] |= reward
        experiment["ppo"] |= PPO
        experiment["evaluation"] |= {"every": EVALUATE_EVERY, "best_of": BEST_OF}
        file = arguments.to / f"{name}.yaml"
        file.write_text(json.dumps(experiment))  # JSON is YAML
        subprocess.run([sys.executable, "-m", "align", "run", str(file), "--replace"], check=True)
    return folder


def curve(run: Path) -> list[Point]:
    """The run's evaluations, beginning with the SFT model."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reference = json.loads((run / "evaluation.json").read_text())["reference"]
    points = [{"kl": 0.0, "score": reference["score_mean"], "gold": reference["gold_mean"]}]
    for row in metrics:
        if "eval/gold_mean" in row:
            point = {"kl": row["eval/kl_per_sequence"], "score": row["eval/score_mean"], "gold": row["eval/gold_mean"]}
            points.append(point)
    return points


def compare(single: list[Point], ensemble: list[Point]) -> None:
    """Print both gold scores at the KL of each of the ensemble's evaluations that both curves reach."""
    for point in ensemble[1:]:
        single_gold = gold_at(single, point["kl"])
        if single_gold is not None:
            print(f"KL {point['kl']:5.2f}: ensemble {point['gold']:.3f}, one model {single_gold:.3f}")


def gold_at(points: list[Point], kl: float) -> float | None:
    """The gold score, interpolated linearly between evaluations; None outside their range."""
    for before, after in pairwise(sorted(points, key=lambda p: p["kl"])):
        if before["kl"] <= kl <= after["kl"] and after["kl"] > before["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


def draw(curves: dict[str, list[list[Point]]], best: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, runs), colour in zip(curves.items(), ("tab:blue", "tab:green"), strict=True):
        for i, points in enumerate(runs):
            points = sorted(points, key=lambda p: p["kl"])
            roots = [max(p["kl"], 0.0) ** 0.5 for p in points]
            gold = [p["gold"] for p in points]
            score = [p["score"] for p in points]
            labels = (None, None) if i else (f"{name}: gold score", f"{name}: its own score")
            axes.plot(roots, gold, color=colour, marker="o", markersize=3, label=labels[0])
            axes.plot(roots, score, color=colour, linestyle=":", linewidth=1, label=labels[1])
    roots = [p["kl"] ** 0.5 for p in best]
    gold = [p["gold_mean"] for p in best]
    axes.plot(roots, gold, color="black", linestyle="--", marker="x", label="best of n: gold score")
    axes.set(xlabel="√KL to the SFT model, nats per sequence", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
