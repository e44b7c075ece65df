"""Measure how much rollout time is hidden by sampling one step ahead of the learner.

    python experiments/benchmarks/ahead.py --run runs/reviews

Runs PPO on the SFT and reward models of a run of experiments/reviews, with one thread for the rollout worker and one
for the learner. Synchronous runs (max_staleness 0) give R and L, the median seconds per step of rollouts and of all the
rest; then the same with max_staleness 1. Ideally the shorter of the two is hidden, so the share of the ideal is
max(R, L) over the median seconds per asynchronous step. Also compares the held-out scores. Writes `ahead.json`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from inputs import require_paths

MODES = {"in_turn": [], "ahead": ["rollouts.max_staleness=1", "ppo.importance_ratio_cap=2.0"]}
WARMUP_STEPS = 2
"""First steps, during which workers start; they are not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of experiments/reviews")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("ahead.json"))
    arguments = parser.parse_args()
    require_paths(parser, arguments.run / "config.yaml")
    runs: dict[str, list[dict[str, Any]]] = {}
    for mode, settings in MODES.items():
        runs[mode] = [run(arguments, mode, settings, seed) for seed in range(arguments.seeds)]
    held_out = {mode: scores(results) for mode, results in runs.items()}
    results = {**overlap(runs), "scores": held_out, "steps": arguments.steps}
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def run(arguments: argparse.Namespace, mode: str, settings: list[str], seed: int) -> dict[str, Any]:
    """Run PPO alone. Returns the metrics of the timed steps and the evaluation."""
    name = f"{mode}-{seed}"
    command = [sys.executable, "-m", "align", "run", str(arguments.run / "config.yaml"), "--replace"]
    overrides = [
        f"name={name}",
        f"seed={seed}",
        "stages=[ppo]",
        f"sft.adapter={arguments.run / 'sft'}",
        f"reward.model={arguments.run / 'reward'}",
        "rollouts.workers=1",
        "rollouts.chunk_size=128",
        "cluster.threads=1",
        f"ppo.steps={arguments.steps}",
        "evaluation.every=0",
        "evaluation.best_of=0",
        "tracking.wandb=disabled",
    ]
    subprocess.run([*command, *overrides, *settings], check=True)
    folder = arguments.run.parent / name
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [row for row in rows if row["stage"] == "ppo" and "time/step" in row][WARMUP_STEPS:]
    return {"times": times, "evaluation": json.loads((folder / "evaluation.json").read_text())}


def overlap(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """R, L, seconds per asynchronous step and share of the ideal, for each seed; the spread of the share."""
    rows = []
    for in_turn, ahead in zip(runs["in_turn"], runs["ahead"], strict=True):
        rollout = median(row["time/rollout"] for row in in_turn["times"])
        rest = median(row["time/step"] - row["time/rollout"] for row in in_turn["times"])
        step = median(row["time/step"] for row in ahead["times"])
        rows.append({"rollout": rollout, "rest": rest, "step_ahead": step, "share": max(rollout, rest) / step})
    shares = [row["share"] for row in rows]
    return {"rounds": rows, "share": {"median": median(shares), "lowest": min(shares), "highest": max(shares)}}


def scores(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out scores and KL of each seed, and the mean score with its standard error."""
    values = [result["evaluation"]["policy"]["score_mean"] for result in results]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    kl = [result["evaluation"]["policy"]["kl_per_sequence"] for result in results]
    return {"score": values, "mean": mean(values), "standard_error": error, "kl": kl}


if __name__ == "__main__":
    main()
