"""Starts or resumes a run: reads its data, locks its folder, and writes or checks its fingerprint."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from align.config.load import dump_experiment
from align.config.schema import Experiment
from align.config.stage import stage_names
from align.data.datasets import Datasets
from align.resources.dtype import settle_dtype
from align.resources.plan import Plan, describe_placement, make_plan
from align.resources.ray_cluster import one_connection
from align.runs.fingerprint import check_fingerprint, find_difference, recorded_dtype, write_fingerprint
from align.runs.folder import RunFolder, begin_run, find_run, folder_of, locked
from align.runs.products import wanted_stages
from align.stages.made_base import make_base, planned_base
from align.stages.pipeline import can_reopen, load_datasets, remaining_stages, reopen


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start or resume, its folder locked by this process.

    Attributes:
        experiment: The settings; `model.dtype` is settled.
        folder: The folder.
        datasets: The data.
        dtype: The dtype and what has settled it, for the plan.
        placement: Where the processes of its stages will run, for the plan.
    """

    experiment: Experiment
    folder: RunFolder
    datasets: Datasets
    dtype: str
    placement: str


@dataclass(frozen=True)
class Planned:
    """What a run would do.

    Attributes:
        experiment: The settings; `model.dtype` is settled.
        stages: The stages that have to run, in order.
        dtype: The dtype and what has settled it.
        placement: Where the processes of the stages will run.
        note: On the folder, where it holds a run of other settings, models or data, so that all stages have to run.
    """

    experiment: Experiment
    stages: list[str]
    dtype: str
    placement: str
    note: str | None = None


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
    make_base(experiment)
    datasets = load_datasets(experiment)
    removed = stage_names() if stages is None else list(stages)
    kept = [stage for stage in stage_names() if folder.done(stage) and stage not in removed]
    settled = settle_dtype(experiment, recorded_dtype(folder) if kept else None)
    experiment = settled.experiment
    placement = describe_placement(experiment, [stage for stage in wanted_stages(experiment) if stage not in kept])
    with locked(folder):
        folder.config.unlink(missing_ok=True)  # a run of which only parts are removed must not be resumed
        write_fingerprint(folder, experiment, datasets)
        begin_run(folder, experiment, removed)
        yield Launch(experiment, folder, datasets, settled.text, placement)


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
    make_base(experiment)
    datasets = load_datasets(experiment)
    settled = settle_dtype(experiment, recorded_dtype(folder))
    experiment = settled.experiment
    placement = describe_placement(experiment, _stages_to_run(experiment, folder))
    with locked(folder):
        check_fingerprint(folder, experiment, datasets)
        dump_experiment(experiment, folder.config)
        reopen(experiment, folder)
        yield Launch(experiment, folder, datasets, settled.text, placement)


def plan_run(experiment: Experiment, gpu_bytes: float | None = None) -> Plan:
    """Plan what a run of this experiment would do and need, in view of what its folder holds.

    Args:
        experiment: The settings.
        gpu_bytes: Memory of the GPU of each process; None: that of the GPUs that the run finds.

    Raises:
        UserError: Something that the settings refer to cannot be used.
    """
    with planned_base(experiment) as settings, one_connection():
        datasets = load_datasets(settings)
        planned = planned_stages(settings, datasets)
        return make_plan(
            planned.experiment,
            datasets,
            planned.stages,
            dtype=planned.dtype,
            placement=planned.placement,
            note=planned.note,
            gpu_bytes=gpu_bytes,
        )


def planned_stages(experiment: Experiment, datasets: Datasets) -> Planned:
    """The stages that a run of this experiment has to go through, in view of what its folder holds.

    Args:
        experiment: The settings.
        datasets: The data that they name.

    Raises:
        UserError: PPO has no reward; the dtype cannot be settled; or there is no room for the actors.
    """
    run = folder_of(experiment)
    remaining = remaining_stages(experiment, run)
    if not run.config.is_file() or not run.fingerprint.is_file():
        settled = settle_dtype(experiment)
        return Planned(settled.experiment, remaining, settled.text, describe_placement(experiment, remaining))
    settled = settle_dtype(experiment, recorded_dtype(run))
    if difference := find_difference(run, settled.experiment, datasets):
        note = f"{difference.text}; --replace runs all stages again, name=… runs them in another folder"
        settled = settle_dtype(experiment)
        wanted = wanted_stages(experiment)
        return Planned(settled.experiment, wanted, settled.text, describe_placement(experiment, wanted), note)
    remaining = _stages_to_run(experiment, run)
    return Planned(settled.experiment, remaining, settled.text, describe_placement(experiment, remaining))


def _stages_to_run(experiment: Experiment, run: RunFolder) -> list[str]:
    """The remaining stages; and PPO, if the settings now request more steps of it than the run has made."""
    reopened = ["ppo"] if can_reopen(experiment, run) else []
    return remaining_stages(experiment, run) + reopened
