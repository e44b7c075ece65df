"""The functions of the Python interface. They are imported from `align` itself; docs/python.md shows their use."""

from collections.abc import Sequence
from pathlib import Path

from align.config.schema import Experiment
from align.outputs.report import write_report
from align.outputs.trained_run import TrainedRun
from align.resources.memory import measure
from align.resources.plan import plan_lines
from align.runs.folder import folder_of, refuse_run
from align.runtime.signals import StopRequest
from align.stages.launch import Launch, new_run, resumed_run
from align.stages.pipeline import load_datasets, remaining_stages, run_stages


def plan(experiment: Experiment) -> list[tuple[str, str]]:
    """Work out what a run would do and need, without starting it.

    Args:
        experiment: The settings.

    Returns:
        Name and text of each line that `align plan` prints.

    Raises:
        UserError: A model, adapter, function or row of data cannot be used.
    """
    stages = remaining_stages(experiment, folder_of(experiment))
    datasets = load_datasets(experiment)
    return plan_lines(experiment, datasets, stages, measure(experiment.model, experiment.policy))


def run(experiment: Experiment, replace: bool = False) -> TrainedRun:
    """Run all stages of an experiment in this process, as `align run` does.

    An exception, KeyboardInterrupt included, leaves the last complete checkpoint, from which `resume` continues.

    Args:
        experiment: The settings.
        replace: Replace an existing run of this name.

    Returns:
        The finished run.

    Raises:
        UserError: The run exists already, or a model, adapter, function or row of data cannot be used.
        Fault: The run has stopped itself, because its figures show that to continue would be useless.
    """
    if not replace:
        refuse_run(folder_of(experiment))
    with new_run(experiment) as launch:
        return _finish(launch)


def resume(run: str | Path | TrainedRun, overrides: Sequence[str] = ()) -> TrainedRun:
    """Resume a stopped run from its last complete checkpoint, as `align resume` does.

    Args:
        run: The run's folder, its name under `runs/`, or the run itself.
        overrides: Settings that replace the run's, as `key.path=value`. They may not change what is learned, but more
            steps, for instance, are possible.

    Returns:
        The finished run.

    Raises:
        UserError: There is no such run, or its settings or data have changed.
        Fault: The run has stopped itself, because its figures show that to continue would be useless.
    """
    where = run.path if isinstance(run, TrainedRun) else run
    with resumed_run(str(where), overrides) as launch:
        return _finish(launch)


def _finish(launch: Launch) -> TrainedRun:
    """Run the remaining stages and write the report."""
    evaluation = run_stages(launch.experiment, launch.folder, launch.datasets, StopRequest())
    write_report(launch.folder.path, evaluation)
    return TrainedRun(launch.experiment, launch.folder)
