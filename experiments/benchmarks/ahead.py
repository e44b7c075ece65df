"""How much of the ideal overlap it gives to sample one step ahead of the learner.

    python experiments/benchmarks/ahead.py --run runs/reviews

PPO on the SFT and reward models of a run of experiments/reviews, one thread for the one rollout worker and one for the
learner: first in turn (max_staleness 0), which gives R and L, the median seconds of a step in rollouts and in all the rest;
then ahead (max_staleness 1). The share is max(R, L) over a step's median seconds ahead, as the ideal is that the shorter of
the two is hidden. With --steps and --seeds it also compares the held-out scores of both. Writes `ahead.json`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

MODES = {"in_turn": [], "ahead": ["rollouts.max_staleness=1", "ppo.importance_ratio_cap=2.0"]}
WARM = 2
"""First steps, in which workers start, that are left out of the times."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run of experiments/reviews")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--to", type=Path, default=Path(__file__).with_name("ahead.json"))
    arguments = parser.parse_args()
    runs = {
        mode: [run(arguments, mode, extra, seed) for seed in range(arguments.seeds)] for mode, extra in MODES.items()
    }
    results = {**overlap(runs), "scores": {mode: scores(of) for mode, of in runs.items()}, "steps": arguments.steps}
    print(json.dumps(results, indent=2))
    arguments.to.write_text(json.dumps(results, indent=2) + "\n")


def run(arguments: argparse.Namespace, mode: str, extra: list[str], seed: int) -> dict[str, Any]:
    """A run of PPO alone: its steps' seconds and its evaluation."""
    name = f"{mode}-{seed}"
    line = [sys.executable, "-m", "align", "run", str(arguments.run / "config.yaml"), "--replace", f"name={name}",
            f"seed={seed}", "stages=[ppo]", f"sft.adapter={arguments.run / 'sft'}",
            f"reward.model={arguments.run / 'reward'}", "rollouts.workers=1", "rollouts.chunk_size=128", "cluster.threads=1",
            f"ppo.steps={arguments.steps}", "evaluation.every=0", "evaluation.best_of=0", "tracking.wandb=disabled",
            *extra]  # fmt: skip
    subprocess.run(line, check=True)
    folder = arguments.run.parent / name
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [row for row in rows if row["stage"] == "ppo" and "time/step" in row][WARM:]
    return {"times": times, "evaluation": json.loads((folder / "evaluation.json").read_text())}


def overlap(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Of each seed: R and L in turn, a step's seconds ahead, and the share of the ideal."""
    rows = []
    for alone, ahead in zip(runs["in_turn"], runs["ahead"], strict=True):
        rollout = median(row["time/rollout"] for row in alone["times"])
        rest = median(row["time/step"] - row["time/rollout"] for row in alone["times"])
        step = median(row["time/step"] for row in ahead["times"])
        rows.append({"rollout": rollout, "rest": rest, "step_ahead": step, "share": max(rollout, rest) / step})
    shares = [row["share"] for row in rows]
    return {"rounds": rows, "share": {"median": median(shares), "lowest": min(shares), "highest": max(shares)}}


def scores(of: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out scores and KL by seed, and their mean with its standard error."""
    values = [result["evaluation"]["policy"]["score_mean"] for result in of]
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    kl = [result["evaluation"]["policy"]["kl_per_sequence"] for result in of]
    return {"score": values, "mean": mean(values), "standard_error": error, "kl": kl}


if __name__ == "__main__":
    main()
