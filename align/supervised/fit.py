"""The loop of a supervised stage: batches, optimizer steps, evaluations and checkpoints."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter

from align.learner.files import read_record, read_states, read_weights, write_states, write_weights
from align.learner.schedules import schedule_factor
from align.learner.state import TrainedWeights
from align.runs.checkpoint import CheckpointTimer, latest, new_checkpoint, step_of
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.failures import Fault
from align.runtime.progress import ProgressBar
from align.runtime.seeds import seed_for
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.batches import batches_from
from align.supervised.learner import StepResult, SupervisedLearners
from policies.errors import UserError
from policies.schema import PolicySettings
from rewards.schema import FitSettings

BEST = "best"
RESULT = "fitted.json"
STATE = "state.json"


@dataclass(frozen=True)
class FitContext:
    """The context of a training run.

    Attributes:
        stage: Name of the stage.
        metric_group: First part of the names of the logged metrics.
        checkpoints: Folder of the stage's checkpoints.
        keep: How many of the latest checkpoints are kept.
        seed: Seed of the order of the examples.
        tracker: Logs the metrics.
        stop: Checked after every step.
        policy: Settings of the adapter.
        base: Folder or hub name of the base model.
        ranks: Number of ranks; 0: one in this process.
        zero: The ZeRO stage.
        first: Number of steps of the stage before this training run.
        checkpoint_minutes: Minutes after the last checkpoint from which the next is due, whatever the step.
    """

    stage: str
    metric_group: str
    checkpoints: Path
    keep: int
    seed: int
    tracker: Tracker
    stop: StopRequest
    policy: PolicySettings
    base: str
    ranks: int = 0
    zero: int = 0
    first: int = 0
    checkpoint_minutes: float = math.inf


@dataclass(frozen=True)
class FitResult:
    """The outcome of a training run.

    Attributes:
        steps: Number of optimizer steps, skipped ones included.
        best_step: Step of the weights that were kept.
        heldout_loss: Held-out loss of the weights that were kept.
    """

    steps: NonNegativeInt
    best_step: NonNegativeInt
    heldout_loss: float


@dataclass
class FitProgress:
    """The progress of a training run: everything in a checkpoint besides the learner's state.

    Attributes:
        step: Number of completed steps, skipped ones included.
        skipped: Number of skipped steps.
        skipped_in_a_row: Number of steps skipped since the last that was not.
        best_step: Step of the best held-out loss so far.
        best_loss: The best held-out loss so far; None before the first evaluation.
        ranks: Number of ranks that saved the optimizer's state; 0: one rank in the controller's process.
        zero: ZeRO stage of these ranks.
    """

    step: NonNegativeInt = 0
    skipped: NonNegativeInt = 0
    skipped_in_a_row: NonNegativeInt = 0
    best_step: NonNegativeInt = 0
    best_loss: float | None = None
    ranks: NonNegativeInt = 0
    zero: NonNegativeInt = 0


_PROGRESS = TypeAdapter(FitProgress)
_RESULT = TypeAdapter(FitResult)


def finished(context: FitContext) -> FitResult | None:
    """The result of a training run that has ended; None before."""
    path = _done(context) / RESULT
    return read_record(path, _RESULT) if path.is_file() else None


def fitted_weights(context: FitContext, adapters: Sequence[str], heads: Sequence[str]) -> TrainedWeights:
    """The weights of a training run that has ended, those with the best held-out loss.

    Args:
        context: Its context.
        adapters: The roles whose adapters were trained.
        heads: The roles whose heads were trained.
    """
    return read_weights(_done(context), context.policy, adapters, heads)


def fit(learners: SupervisedLearners, lengths: Sequence[int], settings: FitSettings, context: FitContext) -> FitResult:
    """Train to the end, from the last checkpoint if there is one.

    The weights with the best held-out loss, which is evaluated every `evaluate_every` steps and at the end, are kept
    (see `fitted_weights`).

    Args:
        learners: The learner, whose objective has not been trained.
        lengths: The length of each training example, in tokens. Batches are made of examples of similar length.
        settings: The settings of the training run.
        context: Its folder, seed, tracker and stop request.

    Raises:
        Interrupted: A stop was requested; a checkpoint has been written.
        Fault: The gradient was not finite in too many consecutive steps.
    """
    run = _Run(learners, lengths, settings, context)
    run.resume()
    run.train()
    assert run.progress.best_loss is not None  # the last step is always evaluated
    result = FitResult(run.progress.step, run.progress.best_step, run.progress.best_loss)
    with new_folder(_done(context)) as folder:
        shutil.copytree(context.checkpoints / BEST, folder, dirs_exist_ok=True)
        write_json(folder / RESULT, asdict(result))
    if context.stop.requested:
        raise Interrupted
    return result


def restore(learners: SupervisedLearners, checkpoint: Path, policy: PolicySettings) -> FitProgress:
    """Restore a checkpoint.

    Args:
        learners: The learner.
        checkpoint: The folder of the checkpoint.
        policy: Settings of the adapter.

    Raises:
        UserError: A file is missing or damaged, or is of another model.
    """
    progress = read_record(checkpoint / STATE, _PROGRESS)
    adapters, heads = learners.trained_names()
    states = read_states(checkpoint, policy, adapters, heads, progress.ranks)
    try:
        learners.restore(states, progress.zero)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return progress


def _done(context: FitContext) -> Path:
    return context.checkpoints / f"done-{context.first}"


@dataclass
class _Run:
    """A training run between two steps."""

    learners: SupervisedLearners
    lengths: Sequence[int]
    settings: FitSettings
    context: FitContext
    progress: FitProgress = field(default_factory=FitProgress)

    @property
    def steps(self) -> int:
        return self.settings.optimizer_steps(len(self.lengths))

    def resume(self) -> None:
        """Restore the last checkpoint of this training run, if there is one."""
        last = latest(self.context.checkpoints)
        if last is not None and step_of(last) > self.context.first:  # not one of an earlier training run of the stage
            self.progress = restore(self.learners, last, self.context.policy)
        self.progress.ranks = self.context.ranks
        self.progress.zero = self.context.zero

    def train(self) -> None:
        """Take the remaining steps. Raises Interrupted if a stop is requested before the last."""
        batches = batches_from(
            step=self.progress.step,
            lengths=self.lengths,
            batch_size=self.settings.batch_size,
            seed=seed_for(self.context.seed, self.context.stage),
        )
        timer = CheckpointTimer(self.settings.checkpoint_every, self.context.checkpoint_minutes)
        with ProgressBar(self.context.stage, self.steps) as progress_bar:
            while not self.is_over():
                numbers = next(batches)
                result = self._step(numbers)
                progress_bar.advance(self.progress.step, self._tokens(numbers), **_shown(result))
                if self.progress.step == self.steps or _is_due(self.progress.step, self.settings.evaluate_every):
                    self._evaluate()
                stops = self.is_over() or self.context.stop.requested
                if stops or timer.is_due(self.progress.step):
                    self._save()
                    timer.restart()
                if stops and not self.is_over():
                    raise Interrupted

    def is_over(self) -> bool:
        """Whether the last step is evaluated, or `patience` evaluations have brought no better held-out loss."""
        progress = self.progress
        if progress.best_loss is None:
            return False
        if progress.step == self.steps:
            return True
        if self.settings.patience is None:
            return False
        return progress.step - progress.best_step >= self.settings.patience * self.settings.evaluate_every

    def _step(self, numbers: Sequence[int]) -> StepResult:
        """Take an optimizer step, and log it."""
        settings = self.settings
        progress = self.progress
        started = time.perf_counter()
        # The schedule does not advance on skipped steps.
        taken = progress.step - progress.skipped
        factor = schedule_factor(settings.schedule, taken, self.steps, settings.warmup)
        result = self.learners.train(numbers, progress.step, factor)
        progress.step += 1
        seconds = time.perf_counter() - started
        rates = {"learning_rate": settings.learning_rate * factor}
        speed = {"tokens_per_second": self._tokens(numbers) / seconds}
        self._log(result.metrics | rates | speed)
        progress.skipped += result.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
        if progress.skipped_in_a_row == settings.max_skipped:
            raise Fault(
                f"the gradient was not finite in {settings.max_skipped} consecutive steps "
                f"({self.context.stage}.max_skipped)"
            )
        return result

    def _tokens(self, numbers: Sequence[int]) -> int:
        """Tokens of the examples of a batch."""
        return sum(self.lengths[number] for number in numbers)

    def _evaluate(self) -> None:
        """Compute the held-out loss, and keep the weights where it is the best so far."""
        metrics = self.learners.heldout_metrics()
        self._log(metrics)
        loss = metrics["heldout_loss"]
        best = self.progress.best_loss
        if best is None or math.isnan(best) or loss < best:
            self.progress.best_loss = loss
            self.progress.best_step = self.progress.step
            product = self.learners.product()
            with new_folder(self.context.checkpoints / BEST) as folder:
                write_weights(folder, product, self.context.policy, self.context.base)

    def _save(self) -> None:
        """Write a checkpoint."""
        context = self.context
        states = self.learners.state()
        with new_checkpoint(context.checkpoints, context.first + self.progress.step, context.keep) as folder:
            write_states(folder, states, context.policy, context.base)
            write_json(folder / STATE, asdict(self.progress))

    def _log(self, metrics: dict[str, float]) -> None:
        named = {f"{self.context.metric_group}/{name}": value for name, value in metrics.items()}
        self.context.tracker.log(self.context.stage, self.context.first + self.progress.step, named)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _shown(result: StepResult) -> dict[str, float]:
    """The figures of the progress line."""
    return {name: result.metrics[name] for name in ("loss", "accuracy") if name in result.metrics}
