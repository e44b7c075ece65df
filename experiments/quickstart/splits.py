"""Compare PPO over different numbers of rollout workers and learner ranks.

    python experiments/quickstart/splits.py --run runs/quickstart --to runs/splits

Starts from the SFT and reward models of a finished quickstart run. Runs PPO with 0, 1 and 2 rollout workers and learner
ranks, with three seeds each, and prints the held-out scores with their standard errors over the seeds.
"""

import argparse
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from rerun import require_run, rerun_ppo

SPLITS = tuple(product((0, 1, 2), (0, 1, 2)))
"""(rollout workers, learner ranks)."""


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--steps", type=int, default=6, help="PPO steps per run")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    require_run(arguments.run)
    scores: dict[tuple[int, int], list[float]] = {}
    for workers, ranks in SPLITS:
        scores[workers, ranks] = [train(arguments, workers, ranks, seed) for seed in range(arguments.seeds)]
    print(table(scores))


def train(arguments: argparse.Namespace, workers: int, ranks: int, seed: int) -> float:
    """The policy's held-out score after a run with this split."""
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
    return rerun_ppo(arguments.run, arguments.to, name, settings)["score_mean"]


def table(scores: dict[tuple[int, int], list[float]]) -> str:
    """One line per split, in Markdown."""
    lines = ["| workers | ranks | held-out score | standard error |", "|---|---|---|---|"]
    for (workers, ranks), values in scores.items():
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        lines.append(f"| {workers} | {ranks} | {mean(values):.4f} | {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
