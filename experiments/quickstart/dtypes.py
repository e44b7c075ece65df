"""Compare PPO with the base model in bfloat16 and in float32.

    python experiments/quickstart/dtypes.py --run runs/quickstart --to runs/dtypes

Starts from the SFT and reward models of a finished quickstart run. Runs PPO in both dtypes with the same seeds, and
prints held-out reward, gold score, gold win rate and KL of each seed, with their means and standard errors.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from rerun import require_run, rerun_ppo

DTYPES = ("float32", "bfloat16")
FIGURES = ("score_mean", "gold_mean", "gold_win_rate", "kl_per_sequence")


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished quickstart run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    require_run(arguments.run)
    print(f"| model.dtype | {' | '.join(FIGURES)} |")
    print("|---" * (len(FIGURES) + 1) + "|")
    for dtype in DTYPES:
        results = []
        for seed in range(arguments.seeds):
            settings = {"seed": seed, "model.dtype": dtype, "evaluation.best_of": 0}
            results.append(rerun_ppo(arguments.run, arguments.to, f"{dtype}-{seed}", settings))
        cells = []
        for name in FIGURES:
            cells.append(cell([result[name] for result in results]))
        print(f"| {dtype} | {' | '.join(cells)} |", flush=True)


def cell(values: list[float]) -> str:
    """The figure of each seed, and their mean with its standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    figures = ", ".join(f"{value:.3f}" for value in values)
    return f"{figures}: {mean(values):.3f}{error}"


if __name__ == "__main__":
    main()
