"""The folder of a run: its paths, its lock, and starting and finding runs."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.load import dump_experiment, load_experiment
from align.config.schema import Experiment
from align.config.stage import find_stage, stage_names, stages_from
from align.runs.tracking import drop_stages
from align.runtime.atomic_files import clean_up, write_json
from align.runtime.ray_job import is_in_cache
from policies.errors import UserError
from policies.files.safe_reading import read_object

WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "events.jsonl",
    "checkpoints",
    "faults",
    "wandb",
    "tensorboard",
)
"""What a run writes besides the products of its stages. Other files in its folder belong to the user."""

DERIVED = ("evaluation.json", "comparisons", "report")
"""What it makes of the products of all stages at its end."""


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run's folder. `sft/`, `reward/` and `policy/` exist once their stage is done.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The settings of the run."""
        return self.path / "config.yaml"

    @property
    def sft(self) -> Path:
        """The SFT adapter."""
        return self.path / "sft"

    @property
    def reward(self) -> Path:
        """The reward model."""
        return self.path / "reward"

    @property
    def best(self) -> Path:
        """The best policy that PPO has evaluated so far, with its evaluation."""
        return self.path / "best"

    @property
    def policy(self) -> Path:
        """The policy that PPO ended with, the best of those evaluated; or the one that DPO ended with."""
        policy = self.path / "policy"
        from_preferences = self.path / "dpo"
        return policy if policy.is_dir() or not from_preferences.is_dir() else from_preferences

    @property
    def fingerprint(self) -> Path:
        """The fingerprint of the run, see `align.runs.fingerprint`."""
        return self.path / "fingerprint.json"

    @property
    def evaluation(self) -> Path:
        """The evaluation of all stages."""
        return self.path / "evaluation.json"

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / "checkpoints" / stage

    @property
    def how_to_resume(self) -> str:
        """What the user is told where the run ends before its end."""
        return f"`align resume {self.path}` resumes from the last checkpoint"

    def read_evaluation(self) -> dict[str, Any]:
        """The content of `evaluation.json`; empty where it does not exist yet."""
        return read_object(self.evaluation) if self.evaluation.is_file() else {}

    def product(self, stage: str) -> Path:
        """The folder that a stage writes when it is done."""
        return self.path / find_stage(stage).folder

    def done(self, stage: str) -> bool:
        """Whether a stage is done: its product exists."""
        return self.product(stage).is_dir()


def folder_of(experiment: Experiment) -> RunFolder:
    """The folder of an experiment's run, which may not exist yet. Raises UserError where it could not be made."""
    path = Path(experiment.runs) / experiment.name
    if is_in_cache(path):
        raise UserError(
            f"runs: {path.resolve()} would be in the folder in which Ray keeps a job's working directory, and which it "
            "deletes: set runs to a folder on storage that lasts, as an absolute path"
        )
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        raise _unusable(path, error) from None
    if not nearest.is_dir():
        raise UserError(f"runs: {path} cannot be made, because {nearest} is not a folder: choose another folder")
    if nearest != path and not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"runs: {path} cannot be made: no permission to write in {nearest}: choose another folder")
    return RunFolder(path)


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(f"runs: {path} cannot be written: {error.strerror}: choose another folder")


def refuse_run(run: RunFolder) -> None:
    """Raise UserError where the folder already contains a run."""
    if run.config.exists():
        raise UserError(
            f"{run.path} holds a run: `align resume {run.path}` continues it, --replace starts it from the "
            "beginning, and name=… puts this one in another folder"
        )


def refuse_stage(run: RunFolder, stage: str) -> None:
    """Raise UserError where this stage of the run, or a later one, is done."""
    for later in stages_from(stage):
        if run.done(later.name):
            raise UserError(
                f"{run.path}: stage {later.name} is done; --replace runs {stage} again and removes the stages after it"
            )


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Lock a run for writing within the block, and clean up what a killed process left half done in its folder.

    Raises:
        UserError: Another process has locked it, or it cannot be made.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = (run.path / ".lock").open("a+")
    except OSError as error:
        raise _unusable(run.path, error) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip()
            writer = f"process {owner}" if owner else "another process"
            raise UserError(
                f"{run.path} is being written by {writer}: wait until it ends, or give this run another `name`"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        clean_up(run.path)
        yield


def is_locked(run: RunFolder) -> bool:
    """Whether a process is writing the run."""
    try:
        with (run.path / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def begin_run(run: RunFolder, experiment: Experiment, stages: Sequence[str] | None = None) -> None:
    """Prepare the folder of a run.

    Args:
        run: The folder, which may contain an earlier run.
        experiment: The run's settings, which are written to `config.yaml`.
        stages: The stages whose files and metrics are removed; None: all stages, and everything else that the run
            wrote.
    """
    names = stage_names() if stages is None else list(stages)
    written = list(DERIVED)
    for stage in map(find_stage, names):
        written += [stage.folder, *stage.scratch]
    if names == stage_names():
        written += WRITTEN
    else:
        drop_stages(run.path, names)
    for name in written:
        path = run.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    run.path.mkdir(parents=True, exist_ok=True)
    dump_experiment(experiment, run.config)


def find_run(name_or_path: str, runs: str = "runs", overrides: Sequence[str] = ()) -> tuple[RunFolder, Experiment]:
    """Find a run.

    Args:
        name_or_path: The folder of the run, or its name under `runs`.
        runs: The folder of all runs.
        overrides: Settings as `key.path=value` that replace those of `config.yaml`.

    Returns:
        The run and its settings.

    Raises:
        UserError: There is no such run, or its settings are not valid.
    """
    folders = (Path(name_or_path), Path(runs) / name_or_path)
    for path in folders:
        if (path / "config.yaml").is_file():
            return RunFolder(path), load_experiment(path / "config.yaml", overrides)
    places = dict.fromkeys(str(path / "config.yaml") for path in folders)
    raise UserError(f"{name_or_path} is not a run: there is no {' and no '.join(places)}")


def change_setting(run: RunFolder, section: str, name: str, value: Any) -> None:
    """Change a setting in the run's `config.yaml`."""
    experiment = load_experiment(run.config)
    changed = getattr(experiment, section).model_copy(update={name: value})
    dump_experiment(experiment.model_copy(update={section: changed}), run.config)


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts that a stage has written to its product's folder; empty where there are none."""
    path = folder / "stage.json"
    return read_object(path) if path.is_file() else {}


def read_peaks(run: RunFolder, stages: Iterable[str]) -> dict[str, dict[str, int]]:
    """The peak memory of each kind of process, in bytes, of those of some stages that have measured it."""
    peaks = {}
    for stage in stages:
        facts = read_facts(run.product(stage))
        if "peak_memory" in facts:
            peaks[stage] = facts["peak_memory"]
    return peaks


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Write the facts of a stage's product: figures, seconds, skipped rows."""
    write_json(folder / "stage.json", facts)
