"""A run's folder: what lies where in it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config import dump_experiment, load_experiment
from align.files import write_json
from align.schema import Experiment
from policies.errors import UserError

WRITTEN = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation.json",
    "sft", "reward", "best", "policy", "checkpoints", "report", "wandb",
)  # fmt: skip
"""Everything that a run writes into its folder; other files there are not ours."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run. `sft/`, `reward/` and `policy/` are there once their stage is done."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def sft(self) -> Path:
        return self.path / "sft"

    @property
    def reward(self) -> Path:
        return self.path / "reward"

    @property
    def best(self) -> Path:
        """The best policy among those that PPO has evaluated so far, with its evaluation."""
        return self.path / "best"

    @property
    def policy(self) -> Path:
        return self.path / "policy"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def done(self, stage: str) -> bool:
        """Whether a stage has written its product."""
        return {"sft": self.sft, "reward": self.reward, "ppo": self.policy}[stage].is_dir()


def create_run(experiment: Experiment, replace: bool) -> RunFolder:
    """Make the folder and write `config.yaml`. Raises UserError where a run is there, unless it is to be replaced."""
    run = RunFolder(Path(experiment.runs) / experiment.name)
    if run.config.exists() and not replace:
        raise UserError(
            f"{run.path} holds a run: `align resume {run.path}` goes on with it, --replace starts it anew, "
            "name=… gives this one another folder"
        )
    remove_run(run)
    run.path.mkdir(parents=True, exist_ok=True)
    dump_experiment(experiment, run.config)
    return run


def remove_run(run: RunFolder) -> None:
    """Remove what a run wrote, and nothing else that lies in its folder."""
    for name in WRITTEN:
        path = run.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def open_run(where: str, runs: str = "runs") -> tuple[RunFolder, Experiment]:
    """The run of a folder, or of a name under `runs`. Raises UserError where there is none."""
    for path in (Path(where), Path(runs) / where):
        if (path / "config.yaml").is_file():
            return RunFolder(path), load_experiment(path / "config.yaml")
    raise UserError(f"{where} is no run: there is no {where}/config.yaml, nor {runs}/{where}/config.yaml")


def read_facts(folder: Path) -> dict[str, Any]:
    """What a stage wrote about itself beside its product."""
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a stage knows of its product: figures, seconds, skipped rows."""
    write_json(folder / "stage.json", facts)
