"""Train the quickstart's policy over every split of the work, and compare what comes of it.

    python experiments/quickstart/splits.py --run runs/quickstart --to runs/splits

Takes the SFT and reward models of a run that is done, and runs PPO with 0, 1 and 2 rollout workers and learner ranks,
three seeds each. Prints a table: held-out scores by split, with their standard error over the seeds.
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from again import ppo_again

SPLITS = tuple(product((0, 1, 2), (0, 1, 2)))
"""Rollout workers, learner ranks."""


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a quickstart run that is done")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--steps", type=int, default=6, help="PPO steps of each run")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    scores = {
        (workers, ranks): [train(arguments, workers, ranks, seed) for seed in range(arguments.seeds)]
        for workers, ranks in SPLITS
    }
    print(table(scores))


def train(arguments: argparse.Namespace, workers: int, ranks: int, seed: int) -> float:
    """The policy's held-out score after a run of this split."""
    settings = {
        "seed": seed,
        "ppo.steps": arguments.steps,
        "rollouts.workers": workers,
        "learner.ranks": ranks,
        "rollouts.max_num_seqs": 64,
        "rollouts.chunk_size": 64,
        "evaluation.best_of": 0,
    }
    name = f"workers-{workers}-ranks-{ranks}-seed-{seed}"
    return ppo_again(arguments.run, arguments.to, name, settings)["score_mean"]


def table(scores: dict[tuple[int, int], list[float]]) -> str:
    """One line a split, in Markdown."""
    lines = ["| workers | ranks | held-out score | standard error |", "|---|---|---|---|"]
    for (workers, ranks), of in scores.items():
        error = stdev(of) / len(of) ** 0.5 if len(of) > 1 else float("nan")
        lines.append(f"| {workers} | {ranks} | {mean(of):.4f} | {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
