"""Starts or resumes a run: reads its data, locks its folder, and writes or checks its fingerprint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from align.config.load import dump_experiment
from align.config.schema import Experiment
from align.config.stage import stage_names
from align.data.datasets import Datasets
from align.runs.fingerprint import check_fingerprint, find_difference, write_fingerprint
from align.runs.folder import RunFolder, begin_run, find_run, folder_of, locked
from align.runs.products import wanted_stages
from align.stages.pipeline import can_reopen, load_datasets, remaining_stages, reopen


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start or resume, its folder locked by this process."""

    experiment: Experiment
    folder: RunFolder
    datasets: Datasets


@contextmanager
def new_run(experiment: Experiment, stages: Sequence[str] | None = None) -> Iterator[Launch]:
    """Prepare the folder of a new run, and lock it within the block.

    Args:
        experiment: The run's settings.
        stages: The stages whose earlier products are removed; None: all.

    Raises:
        UserError: Something that the settings refer to cannot be used, or another process writes the run.
    """
    folder = folder_of(experiment)
    datasets = load_datasets(experiment)
    with locked(folder):
        folder.config.unlink(missing_ok=True)  # a run of which only parts are removed must not be resumed
        write_fingerprint(folder, experiment, datasets)
        begin_run(folder, experiment, stage_names() if stages is None else stages)
        yield Launch(experiment, folder, datasets)


@contextmanager
def resumed_run(name_or_path: str, overrides: Sequence[str] = ()) -> Iterator[Launch]:
    """Open a stopped run to resume it, and lock its folder within the block.

    Args:
        name_or_path: The run's folder, or its name under `runs/`.
        overrides: Settings that replace the run's, as `key.path=value`; none may change what is learned.

    Raises:
        UserError: There is no such run, its settings or data have changed, or another process writes it.
    """
    folder, experiment = find_run(name_or_path, overrides=overrides)
    datasets = load_datasets(experiment)
    with locked(folder):
        check_fingerprint(folder, experiment, datasets)
        dump_experiment(experiment, folder.config)
        reopen(experiment, folder)
        yield Launch(experiment, folder, datasets)


def planned_stages(experiment: Experiment, datasets: Datasets) -> tuple[list[str], str | None]:
    """The stages that a run of this experiment has to go through, in view of what its folder holds.

    Args:
        experiment: The settings.
        datasets: The data that they name.

    Returns:
        The stages, in order; and a note on the folder where it holds a run of other settings, models or data, so that
        all stages have to run.

    Raises:
        UserError: PPO has no reward.
    """
    run = folder_of(experiment)
    remaining = remaining_stages(experiment, run)
    if not run.config.is_file() or not run.fingerprint.is_file():
        return remaining, None
    if difference := find_difference(run, experiment, datasets):
        note = f"{difference.text}; --replace runs all stages again, name=… runs them in another folder"
        return wanted_stages(experiment), note
    if can_reopen(experiment, run):
        return [*remaining, "ppo"], None
    return remaining, None
