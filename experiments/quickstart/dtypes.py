"""Whether PPO learns as well with its base in bfloat16 as in float32.

    python experiments/quickstart/dtypes.py --run runs/quickstart --to runs/dtypes

Uses the SFT and reward models of a quickstart run that is done. PPO in either dtype with the same seeds: the held-out
score by the reward model, the gold score and the KL, and their means with standard errors.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from again import ppo_again

DTYPES = ("float32", "bfloat16")
FIGURES = ("score_mean", "gold_mean", "gold_win_rate", "kl_per_sequence")


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a quickstart run that is done")
    parser.add_argument("--to", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"| model.dtype | {' | '.join(FIGURES)} |")
    print("|---" * (len(FIGURES) + 1) + "|")
    for dtype in DTYPES:
        found = [
            ppo_again(
                arguments.run,
                arguments.to,
                f"{dtype}-{seed}",
                {"seed": seed, "model.dtype": dtype, "evaluation.best_of": 0},
            )
            for seed in range(arguments.seeds)
        ]
        print(f"| {dtype} | {' | '.join(cell([run[name] for run in found]) for name in FIGURES)} |", flush=True)


def cell(values: list[float]) -> str:
    """Each seed's figure, and their mean with its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{', '.join(f'{value:.3f}' for value in values)}: {mean(values):.3f}{error}"


if __name__ == "__main__":
    main()
