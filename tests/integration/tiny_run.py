"""A small experiment on the tiny model: its settings, its run, and the command in a process of its own."""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.runs.folder import begin_run, folder_of
from align.runtime.signals import Interrupted, StopRequest
from align.stages.pipeline import load_datasets, run_stages

COMMAND = (sys.executable, "-m", "align")
ENVIRONMENT = os.environ | {"COLUMNS": "200"}

WORDS = ("cat", "dog", "mat", "door", "blue", "red", "two", "three", "short", "long")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_settings(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of all three stages, seconds long, with data and runs in a folder."""
    pick = random.Random(0)

    def text(words: int) -> str:
        return " ".join(pick.choice(WORDS) for _ in range(words))

    prompts = [f"User: {text(4)} Assistant:" for _ in range(40)]
    return {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "float32"},
        "policy": {"rank": 2, "alpha": 4},
        "data": {
            "demonstrations": write_rows(
                folder / "demonstrations.jsonl", [{"prompt": p, "completion": f" {text(4)}."} for p in prompts]
            ),
            "preferences": write_rows(
                folder / "pairs.jsonl",
                [{"prompt": p, "chosen": f" {text(3)}.", "rejected": f" {text(6)}."} for p in prompts],
            ),
            "prompts": write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in prompts]),
        },
        "sft": {"batch_size": 12, "checkpoint_every": 1},
        "reward": {"batch_size": 12, "normalise": 8, "checkpoint_every": 1},
        "rollouts": {"max_num_seqs": 4, "max_new_tokens": 6},
        "ppo": {"steps": 3, "batch_size": 8, "epochs": 2, "minibatches": 2, "kl": {"target": 1.0}},
        "learner": {"tokens_per_microbatch": 128},
        "evaluation": {"prompts": 4, "every": 1, "best_of": 2},
        "checkpoint": {"every": 1},
        "tracking": {"wandb": "disabled"},
        "cluster": {"threads": 1},
    }


def run_in_process(settings: dict[str, Any]) -> Path:
    """Run all stages. Gives the run's folder."""
    experiment = Experiment.model_validate(settings)
    run = folder_of(experiment)
    datasets = load_datasets(experiment)
    begin_run(run, experiment)
    run_stages(experiment, run, datasets, StopRequest())
    return run.path


def run_a_step_at_a_time(settings: dict[str, Any]) -> Path:
    """Run all stages, stopped after every step of each and taken up again. Gives the run's folder."""
    experiment = Experiment.model_validate(settings)
    run, stop = folder_of(experiment), StopRequest()
    begin_run(run, experiment)
    while True:
        stop.requested = True
        try:
            run_stages(experiment, run, load_datasets(experiment), stop)
        except Interrupted:
            continue
        return run.path


def figures(run: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` without what the clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not is_timed(name)} for row in rows]


def is_timed(name: str) -> bool:
    """Whether the clock decides a metric."""
    return name.startswith(("time/", "perf/")) or name.endswith("/tokens_per_second")
