"""Train the quickstart's policy by preference optimisation, PPO, GRPO and RLOO, and compare them.

    python experiments/quickstart/algorithms.py --runs runs/quickstart runs/quickstart-1 runs/quickstart-2 \\
        --to runs/algorithms

Each finished quickstart run, one per seed, gives its SFT model, its reward model, its preferences and its prompts.
Prints a table of means over the seeds with their standard errors;
best of 8 is the SFT model's, by the reward model.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rerun import require_run, rerun_ppo

GROUP = {"ppo.samples_per_prompt": 4}
ALGORITHMS: dict[str, tuple[str, dict[str, object]]] = {
    "DPO": ("dpo", {"dpo.loss": "dpo", "dpo.learning_rate": 1e-3}),
    "IPO": ("dpo", {"dpo.loss": "ipo", "dpo.learning_rate": 1e-3}),
    "SimPO": ("dpo", {"dpo.loss": "simpo", "dpo.learning_rate": 1e-3}),
    "KTO": ("dpo", {"dpo.loss": "kto", "dpo.learning_rate": 1e-3}),
    "GRPO": ("ppo", {"ppo.estimator": "grpo", **GROUP}),
    "RLOO": ("ppo", {"ppo.estimator": "rloo", **GROUP}),
    "PPO": ("ppo", {}),
}
"""The stage that trains the policy, and the settings that differ from the quickstart's."""
FIGURES = ("gold_mean", "gold_win_rate", "kl_per_sequence", "seconds")


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished quickstart runs, one per seed")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--only", default="", help="run only algorithms whose name contains this")
    arguments = parser.parse_args()
    for run in arguments.runs:
        require_run(run)
    print("| | gold score | gold win rate | KL, nats per sequence | seconds |")
    print("|---|---|---|---|---|")
    references = [json.loads((run / "evaluation.json").read_text()) for run in arguments.runs]
    show("SFT", [{"gold_mean": evaluation["reference"]["gold_mean"]} for evaluation in references])
    show("best of 8", [{"gold_mean": evaluation["best_of"]["gold_mean"]} for evaluation in references])
    for name, (stage, settings) in ALGORITHMS.items():
        if arguments.only in name:
            show(name, [train(run, arguments.to, name, stage, settings) for run in arguments.runs])


def train(run: Path, to: Path, name: str, stage: str, settings: dict[str, object]) -> dict[str, float]:
    """The figures of an algorithm from one seed's models, with the seconds of its stage."""
    folder = to / run.name
    policy = rerun_ppo(run, folder, name, {"evaluation.best_of": 0, **settings}, stage)
    seconds: dict[str, Any] = json.loads((folder / name / "evaluation.json").read_text())["seconds"]
    return {**policy, "seconds": seconds[stage]}


def show(name: str, of_seeds: list[dict[str, float]]) -> None:
    """Print a row of the table: means over the seeds, with their standard errors where there are several."""
    cells = [mean_and_error([figures[key] for figures in of_seeds if key in figures]) for key in FIGURES]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def mean_and_error(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{fmean(values):.3g}{error}"


if __name__ == "__main__":
    main()
