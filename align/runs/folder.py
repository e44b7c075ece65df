"""A run's folder: what lies where in it."""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.load import dump_experiment, load_experiment
from align.config.schema import Experiment
from align.config.stage import find_stage, stage_names, stages_from
from align.runtime.atomic_files import write_json
from policies.errors import UserError
from policies.files.safe_reading import read_object

WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "evaluation.json",
    "checkpoints",
    "faults",
    "report",
    "wandb",
)
"""What a run writes besides; other files in its folder are not ours."""


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
    def fingerprint(self) -> Path:
        return self.path / "fingerprint.json"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    def checkpoints(self, stage: str) -> Path:
        return self.path / "checkpoints" / stage

    def read_evaluation(self) -> dict[str, Any]:
        """What `evaluation.json` holds; nothing where it is not there yet."""
        return read_object(self.evaluation) if self.evaluation.is_file() else {}

    def product(self, stage: str) -> Path:
        """The folder that a stage writes when it is done."""
        return self.path / find_stage(stage).folder

    def done(self, stage: str) -> bool:
        """Whether a stage has written its product."""
        return self.product(stage).is_dir()


def folder_of(experiment: Experiment) -> RunFolder:
    """Where an experiment's run is, or will be."""
    return RunFolder(Path(experiment.runs) / experiment.name)


def refuse_run(run: RunFolder) -> None:
    """Raise UserError where the folder holds a run."""
    if run.config.exists():
        raise UserError(
            f"{run.path} holds a run: `align resume {run.path}` goes on with it, --replace starts it anew, "
            "name=… gives this one another folder"
        )


def refuse_stage(run: RunFolder, stage: str) -> None:
    """Raise UserError where the run has done this stage or a later one."""
    for later in (found.name for found in stages_from(stage)):
        if run.done(later):
            raise UserError(f"{run.path} has done {later}: --replace does {stage} anew and forgets what came after it")


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keep other processes from writing this run. Raises UserError where one does."""
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run.path} is being written by process {file.read().strip() or 'of another'}: wait for its end, or "
                "give this run a `name` of its own"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def begin_run(run: RunFolder, experiment: Experiment, stages: Sequence[str] | None = None) -> None:
    """Remove what an earlier run wrote of these stages (unset: all), and no other files; write `config.yaml`."""
    names = stage_names() if stages is None else list(stages)
    written: list[str] = []
    for stage in map(find_stage, names):
        written += [stage.folder, *stage.scratch]
    if names == stage_names():
        written += WRITTEN
    for name in written:
        path = run.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.path.mkdir(parents=True, exist_ok=True)
    dump_experiment(experiment, run.config)


def find_run(where: str, runs: str = "runs", overrides: Sequence[str] = ()) -> tuple[RunFolder, Experiment]:
    """The run of a folder, or of a name under `runs`, and its settings. Raises UserError where there is none."""
    for path in (Path(where), Path(runs) / where):
        if (path / "config.yaml").is_file():
            return RunFolder(path), load_experiment(path / "config.yaml", overrides)
    raise UserError(f"{where} is no run: there is no {where}/config.yaml, nor {runs}/{where}/config.yaml")


def read_facts(folder: Path) -> dict[str, Any]:
    """What a stage wrote about itself beside its product."""
    path = folder / "stage.json"
    return read_object(path) if path.is_file() else {}


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write what a stage knows of its product: figures, seconds, skipped rows."""
    write_json(folder / "stage.json", facts)
