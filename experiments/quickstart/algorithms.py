"""Compare prompting, SFT, preference optimisation, best-of-n, GRPO, RLOO and PPO in the quickstart's environment.

    python experiments/quickstart/algorithms.py --runs runs/quickstart runs/quickstart-1 runs/quickstart-2 \\
        --to runs/algorithms

Each finished quickstart run, one per seed, gives its SFT model, its reward model, its preferences and its prompts.
Prints a table of means over the seeds with their standard errors. Best of 8 is the SFT model's, by the reward model;
few-shot is the SFT model with three demonstrations before the prompt. The seconds are of the processor, from the start
of the command to its end, evaluation included.
"""

import argparse
import json
import math
import resource
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
FIGURES = ("gold_mean", "gold_win_rate", "kl_per_sequence", "cpu_seconds")
SHOTS = 3
"""Demonstrations before a prompt."""


def main() -> None:
    """Do the runs that are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished quickstart runs, one per seed")
    parser.add_argument("--to", type=Path, required=True, help="folder of the new runs")
    parser.add_argument("--only", default="", help="run only algorithms whose name contains this")
    arguments = parser.parse_args()
    for run in arguments.runs:
        require_run(run)
    print("| | gold score | gold wins | KL, nats per sequence | processor seconds |")
    print("|---|---|---|---|---|")
    references = [json.loads((run / "evaluation.json").read_text()) for run in arguments.runs]
    show("SFT", [{"gold_mean": evaluation["reference"]["gold_mean"]} for evaluation in references])
    show("best of 8", [{"gold_mean": evaluation["best_of"]["gold_mean"]} for evaluation in references])
    show("few-shot", [prompted(run, arguments.to) for run in arguments.runs])
    for name, (stage, settings) in ALGORITHMS.items():
        if arguments.only in name:
            show(name, [train(run, arguments.to, name, stage, settings) for run in arguments.runs])


def train(run: Path, to: Path, name: str, stage: str, settings: dict[str, object]) -> dict[str, float]:
    """The figures of an algorithm from one seed's models, with the processor's seconds."""
    folder = to / run.name
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    policy = rerun_ppo(run, folder, name, {"evaluation.best_of": 0, **settings}, stage)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = folder / name / "cpu_seconds.json"
    if not record.exists():  # it was run now
        record.write_text(json.dumps(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return {**policy, "cpu_seconds": json.loads(record.read_text())}


def prompted(run: Path, to: Path) -> dict[str, float]:
    """The figures of the SFT model with demonstrations before the prompt, from the evaluation of one step of PPO."""
    lines = (run / "environment" / "demonstrations.jsonl").read_text().splitlines()[:SHOTS]
    style = {"few_shot": {"examples": [json.loads(line) for line in lines]}}
    settings = {"ppo.steps": 1, "evaluation.best_of": 0, "evaluation.prompt_styles": json.dumps(style)}
    rerun_ppo(run, to / run.name, "few-shot", settings)
    evaluation: dict[str, Any] = json.loads((to / run.name / "few-shot" / "evaluation.json").read_text())
    return {"gold_mean": evaluation["prompt_styles"]["few_shot"]["gold_mean"]}


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
