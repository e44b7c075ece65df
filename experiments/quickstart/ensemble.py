"""PPO against one reward model and against an ensemble of four, on the quickstart's world, with its gold score.

    python experiments/quickstart/ensemble.py --run runs/quickstart --to runs/ensemble

Takes the SFT model and the world of a quickstart run that is done. Trains four reward models, runs PPO far by the first
alone and by all of them, and draws gold score against √KL of both beside the best of n SFT samples.
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from align.config.load import load_experiment

MEMBERS = 4
PPO = {"steps": 24, "kl": {"coefficient": 0.01}}
"""A loose leash, so that both go on until the reward model's mistakes show."""
EVERY, BEST_OF = 2, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a quickstart run that is done")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/quickstart-ensemble.png"))
    parser.add_argument("--combine", default="mean_minus_std")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[list[dict[str, float]]]] = {"one model": [], f"ensemble of {MEMBERS}": []}
    best: list[dict[str, float]] = []
    for seed in range(arguments.seeds):
        together = {"members": MEMBERS, "combine": arguments.combine}
        ensemble = train(arguments, f"ensemble-{seed}", seed, {"ensemble": together})
        one = {"model": str(ensemble / "reward"), "ensemble": {"members": 1}}
        alone = train(arguments, f"one-{seed}", seed, one)
        for name, folder in zip(curves, (alone, ensemble), strict=True):
            curves[name].append(curve(folder))
        best = json.loads((alone / "evaluation.json").read_text())["best_of"]["curve"]
        compare(*(runs[-1] for runs in curves.values()))
    draw(curves, best, arguments.plot)


def train(arguments: argparse.Namespace, name: str, seed: int, reward: dict[str, Any]) -> Path:
    """The folder of a run; one that is there is taken as it is."""
    folder: Path = arguments.to / name
    if not (folder / "evaluation.json").is_file():
        experiment = load_experiment(arguments.run / "config.yaml").model_dump(mode="json")
        experiment |= {"name": name, "runs": str(arguments.to), "seed": seed, "stages": ["reward", "ppo"]}
        experiment["sft"]["adapter"] = str(arguments.run / "sft")
        experiment["reward"] |= reward
        experiment["ppo"] |= PPO
        experiment["evaluation"] |= {"every": EVERY, "best_of": BEST_OF}
        file = arguments.to / f"{name}.yaml"
        file.write_text(json.dumps(experiment))  # JSON is YAML
        subprocess.run([sys.executable, "-m", "align", "run", str(file), "--replace"], check=True)
    return folder


def curve(run: Path) -> list[dict[str, float]]:
    """KL, score and gold score of each evaluation, from the SFT model on."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reference = json.loads((run / "evaluation.json").read_text())["reference"]
    points = [{"kl": 0.0, "score": reference["score_mean"], "gold": reference["gold_mean"]}]
    for row in metrics:
        if "eval/gold_mean" in row:
            points.append({
                "kl": row["eval/kl_per_sequence"], "score": row["eval/score_mean"], "gold": row["eval/gold_mean"],
            })  # fmt: skip
    return points


def compare(one: list[dict[str, float]], ensemble: list[dict[str, float]]) -> None:
    """Print the gold scores at the KLs that both have come to."""
    for point in ensemble[1:]:
        other = gold_at(one, point["kl"])
        if other is not None:
            print(f"KL {point['kl']:5.2f}: ensemble {point['gold']:.3f}, one model {other:.3f}")


def gold_at(points: list[dict[str, float]], kl: float) -> float | None:
    """On straight lines between evaluations; None beyond the last."""
    for before, after in pairwise(sorted(points, key=lambda p: p["kl"])):
        if before["kl"] <= kl <= after["kl"] and after["kl"] > before["kl"]:
            share = (kl - before["kl"]) / (after["kl"] - before["kl"])
            return before["gold"] + share * (after["gold"] - before["gold"])
    return None


def draw(curves: dict[str, list[list[dict[str, float]]]], best: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, runs), colour in zip(curves.items(), ("tab:blue", "tab:green"), strict=True):
        for i, points in enumerate(runs):
            points = sorted(points, key=lambda p: p["kl"])
            roots = [max(p["kl"], 0.0) ** 0.5 for p in points]
            label = {"gold": f"{name}: gold score", "score": f"{name}: its own score"}
            axes.plot(roots, [p["gold"] for p in points], color=colour, marker="o", markersize=3,
                      label=None if i else label["gold"])  # fmt: skip
            axes.plot(roots, [p["score"] for p in points], color=colour, linestyle=":", linewidth=1,
                      label=None if i else label["score"])  # fmt: skip
    axes.plot([p["kl"] ** 0.5 for p in best], [p["gold_mean"] for p in best], color="black", linestyle="--", marker="x",
              label="best of n: gold score")  # fmt: skip
    axes.set(xlabel="√KL to the SFT model, nats a sequence", ylabel="score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
