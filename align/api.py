"""The functions of the Python interface. They are imported from `align` itself; docs/python.md shows their use."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.outputs.trained_run import TrainedRun
from align.ppo.loop import Step
from align.ppo.metrics import step_metrics
from align.report.page import write_report
from align.report.run_record import read_run_record
from align.resources.dtype import settle_dtype
from align.resources.ray_cluster import compute_settings
from align.runs.fingerprint import recorded_dtype
from align.runs.folder import RunFolder, folder_of, refuse_run
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder
from align.runtime.signals import StopRequest
from align.scoring.build import build_scorers
from align.stages.context import StageContext
from align.stages.launch import Launch, new_run, plan_run, resumed_run
from align.stages.pipeline import load_datasets, remaining_stages, run_stages, with_actors
from align.stages.ppo_parts import PpoParts, assemble, gpus_left_to_actors
from policies.errors import UserError
from policies.files.adapters import save_adapter
from policies.files.base_model import load_model_tokenizer


def plan(experiment: Experiment) -> list[tuple[str, str]]:
    """Show what a run would do and need, without starting it.

    Args:
        experiment: The settings.

    Returns:
        The name and the text of each line that `align plan` prints.

    Raises:
        UserError: A model, adapter, function or row of data cannot be used.
    """
    return plan_run(experiment).lines


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
        Fault: The run has stopped itself, because its figures make it pointless to continue.
    """
    if not replace:
        refuse_run(folder_of(experiment))
    return _finish(new_run(experiment))


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
        Fault: The run has stopped itself, because its figures make it pointless to continue.
    """
    name_or_path = run.path if isinstance(run, TrainedRun) else run
    return _finish(resumed_run(str(name_or_path), overrides))


def _finish(opened: AbstractContextManager[Launch]) -> TrainedRun:
    """Run the remaining stages and, once the run is not locked any more, write the report, which says its state."""
    with opened as launch:
        evaluation = run_stages(launch.experiment, launch.folder, launch.datasets, StopRequest())
    write_report(read_run_record(launch.folder.path, evaluation))
    return TrainedRun(launch.experiment, launch.folder)


class PpoSession:
    """The parts of PPO, stepped by hand, from `build_ppo`. It writes nothing to the run's folder.

    Attributes:
        experiment: The settings.
    """

    def __init__(self, experiment: Experiment, parts: PpoParts) -> None:
        self.experiment = experiment
        self._parts = parts

    def steps(self) -> Iterator[Step]:
        """Run the remaining steps up to `ppo.steps`, one per iteration: sample, score, estimate advantages, update.

        Yields:
            The results of the step: `index` (from 0), `trajectories`, `scored` (the role outputs and the score of each
            trajectory), `episodes` (what was trained on), `statistics` (of the update) and `seconds`.
        """
        return self._parts.remaining_steps()

    def metrics(self, step: Step) -> dict[str, float]:
        """The metrics of a step, by their names in `metrics.jsonl`. Call it before the next step."""
        scorers = self._parts.scorers
        gold = None if scorers.gold is None else scorers.gold(step.trajectories)
        return step_metrics(step, self.experiment.ppo, gold)

    def evaluate(self) -> dict[str, Any]:
        """Compare the current policy with the reference; the result has the form of `evaluation.json`."""
        loop = self._parts.loop
        return self._parts.evaluator.evaluate(loop.step, loop.learners.policy_weights()).sections

    def save(self, to: str | Path) -> None:
        """Write the current policy to a folder, as an adapter in PEFT's layout.

        Args:
            to: The folder; an existing one is replaced.
        """
        weights = self._parts.loop.learners.policy_weights()
        with new_folder(Path(to)) as folder:
            save_adapter(folder, weights, self.experiment.policy, self.experiment.model.path)


@contextmanager
def build_ppo(experiment: Experiment) -> Iterator[PpoSession]:
    """Build the parts of PPO from the SFT model and the reward of a run, to step them by hand.

    PPO resumes from the run's last checkpoint, if there is one. The parts, Ray actors included, are closed when the
    block ends.

    Args:
        experiment: The settings of a run whose other stages have finished.

    Yields:
        The session.

    Raises:
        UserError: The run has not finished its other stages, or has finished PPO, or something that the settings refer
            to cannot be used.
    """
    run = folder_of(experiment)
    _refuse_unless_ppo_is_next(experiment, run)
    datasets = load_datasets(experiment)
    experiment = settle_dtype(experiment, recorded_dtype(run)).experiment
    compute_settings(experiment).apply()
    tokenizer = load_model_tokenizer(experiment.model)
    context = StageContext(
        experiment=experiment,
        run=run,
        tokenizer=tokenizer,
        datasets=datasets,
        tracker=Tracker(run.path),
        stop=StopRequest(),
    )
    with ExitStack() as stack:
        context = with_actors(context, ["ppo"], stack)
        stack.enter_context(gpus_left_to_actors(context))
        scorers = build_scorers(experiment, run, tokenizer)
        stack.callback(scorers.close)
        yield PpoSession(experiment, assemble(context, scorers, stack))


def _refuse_unless_ppo_is_next(experiment: Experiment, run: RunFolder) -> None:
    remaining = remaining_stages(experiment, run)
    if run.done("ppo"):
        raise UserError(f"run {run.path} has finished PPO: give the experiment another `name`")
    if remaining != ["ppo"]:
        missing = ", ".join(remaining) or "nothing"
        raise UserError(
            "build_ppo needs an experiment with the stage ppo, and a run that has finished all others; "
            f"{run.path} still needs: {missing}"
        )
