"""Supervised training on transformers' Trainer, with align's own checkpoints and metrics."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from align.learner.schedules import warmed
from align.runs.checkpoint import latest, prune, seal, step_of
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder, publish_folder, write_json
from align.runtime.progress import ProgressBar
from align.runtime.seeds import seed_for
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.trainer import (
    TRAINED_WEIGHTS,
    Collate,
    FitTrainer,
    Objective,
    SkipNonFinite,
    SplitByLength,
    TrainingExample,
    read_trained_weights,
    split_microbatches,
    trained_weights,
)
from align.supervised.trainer_state import read_state
from policies.errors import UserError
from policies.files.safe_reading import read_object
from policies.files.writing import save_tensors
from policies.layers.lora import parameter_groups_by_rate
from rewards.schema import FitSettings

BEST = "best"
RESULT = "fitted.json"


@dataclass(frozen=True)
class FitTask:
    """What is trained, and on which examples.

    Attributes:
        objective: The module whose parameters that require gradients are trained. Its forward pass returns
            `{"loss": …}`: the summed losses of a microbatch divided by `num_items_in_batch`, the number of `labels` in
            the whole batch.
        examples: The training examples.
        collate: Turns the examples of a microbatch into the objective's arguments.
        split: Splits a batch into microbatches, see `Trunk.microbatches`.
        heldout_loss: Computes the loss of the objective on held-out examples.
        metric_group: First part of the names of the logged metrics.
        lora_plus: `policy.lora_plus`.
        parameter_groups: Parameters with settings of AdamW of their own, as its parameter groups.
    """

    objective: Objective
    examples: Sequence[TrainingExample]
    collate: Collate
    split: SplitByLength
    heldout_loss: Callable[[], float]
    metric_group: str
    lora_plus: float | None = None
    parameter_groups: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class FitContext:
    """The context of a training run.

    Attributes:
        stage: Name of the stage.
        checkpoints: Folder of the stage's checkpoints.
        keep: How many of the latest checkpoints are kept.
        seed: Seed of the order of the examples.
        tracker: Logs the metrics.
        stop: Checked after every step.
        first: Number of steps of the stage before this training run.
    """

    stage: str
    checkpoints: Path
    keep: int
    seed: int
    tracker: Tracker
    stop: StopRequest
    first: int = 0


@dataclass(frozen=True)
class FitResult:
    """The outcome of a training run.

    Attributes:
        steps: Number of optimizer steps taken.
        best_step: Step of the weights that were kept.
        heldout_loss: Held-out loss of the weights that were kept.
    """

    steps: int
    best_step: int
    heldout_loss: float


def fit(task: FitTask, settings: FitSettings, context: FitContext) -> FitResult:
    """Train an objective, or resume its training from the last checkpoint.

    Afterwards the objective holds the weights with the best held-out loss, which is evaluated every `evaluate_every`
    steps and at the end. Batches are made of examples of similar length.

    Args:
        task: What is trained.
        settings: The settings of the training run.
        context: Its folder, seed, tracker and stop request.

    Raises:
        Interrupted: A stop was requested; a checkpoint has been written.
        Fault: The gradient was not finite in too many consecutive steps.
    """
    done = context.checkpoints / f"done-{context.first}"
    if done.is_dir():
        read_trained_weights(task.objective, done / TRAINED_WEIGHTS)
        return _read_result(done / RESULT)
    state = _train(task, settings, context)
    assert state.best_metric is not None  # the last step is always evaluated
    read_trained_weights(task.objective, context.checkpoints / BEST / TRAINED_WEIGHTS)
    result = FitResult(state.global_step, state.best_global_step, state.best_metric)
    with new_folder(done) as folder:
        save_tensors(trained_weights(task.objective), folder / TRAINED_WEIGHTS)
        write_json(folder / RESULT, asdict(result))
    if context.stop.requested:
        raise Interrupted
    return result


def _train(task: FitTask, settings: FitSettings, context: FitContext) -> TrainerState:
    """Train to the end. Raises Interrupted if a stop is requested before."""
    for unsealed in context.checkpoints.glob("checkpoint-*"):  # the Trainer was killed while it wrote this one
        shutil.rmtree(unsealed)
    task.objective.eval()  # brings all submodules into one mode, or `Objective.train` would skip some
    task.objective.accepts_loss_kwargs = True  # type: ignore[assignment]  # makes the Trainer pass num_items_in_batch
    steps = settings.optimizer_steps(len(task.examples))
    arguments = _training_arguments(settings, context, steps)
    with ProgressBar(context.stage, steps) as progress:
        monitor = _Monitor(task, settings, context, steps, progress)
        trainer = FitTrainer(
            model=task.objective,
            args=arguments,
            train_dataset=task.examples,
            data_collator=partial(split_microbatches, task.collate, task.split, settings.tokens_per_microbatch),
            optimizers=(_optimizer(task, settings), None),
            callbacks=[monitor],
        )
        trainer.remove_callback(PrinterCallback)
        optimizer = trainer.create_optimizer()
        _move_to_own_groups(optimizer, task.parameter_groups)
        optimizer.register_step_pre_hook(SkipNonFinite(settings.max_skipped, context.stage))
        last = latest(context.checkpoints)
        if last is None or step_of(last) <= context.first:  # none, or one of an earlier training run of this stage
            trainer.train()
            state = trainer.state
        else:
            state = read_state(last)
            if not monitor.is_over(state):
                trainer.train(resume_from_checkpoint=str(last))
                state = trainer.state
    task.objective.eval()
    if not monitor.is_over(state):
        raise Interrupted
    return state


def _training_arguments(settings: FitSettings, context: FitContext, steps: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(context.checkpoints),
        per_device_train_batch_size=settings.batch_size,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=warmed(settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.checkpoint_every,
        seed=seed_for(context.seed, context.stage) % 2**32,  # NumPy takes 32 bits
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the objective is one module on one device; no DataParallel
    return arguments


def _read_result(path: Path) -> FitResult:
    values = read_object(path)
    try:
        return FitResult(int(values["steps"]), int(values["best_step"]), float(values["heldout_loss"]))
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _optimizer(task: FitTask, settings: FitSettings) -> Optimizer | None:
    """AdamW with the learning rates of LoRA+; None leaves the optimizer to the Trainer."""
    if task.lora_plus is None:
        return None
    trained = [(name, p) for name, p in task.objective.named_parameters() if p.requires_grad]
    groups = []
    for factor, parameters in parameter_groups_by_rate(trained, task.lora_plus):
        groups.append({"params": parameters, "lr": settings.learning_rate * factor})
    return AdamW(groups, weight_decay=settings.weight_decay, fused=True)


def _move_to_own_groups(optimizer: Optimizer, own_groups: Sequence[Mapping[str, Any]]) -> None:
    """Give parameters groups of their own instead of those that they are in."""
    moved: set[int] = set()
    for group in own_groups:
        moved.update(id(parameter) for parameter in group["params"])
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    for group in own_groups:
        optimizer.add_param_group(dict(group))


class _Monitor(TrainerCallback):
    """Logs every step, evaluates the held-out loss, seals checkpoints, and decides when training is over."""

    def __init__(
        self, task: FitTask, settings: FitSettings, context: FitContext, steps: int, progress: ProgressBar
    ) -> None:
        self.task = task
        self.settings = settings
        self.context = context
        self.steps = steps
        self.progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            metrics = {
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "gradient_norm": logs["grad_norm"],
            }
            self._log(state, metrics)
            self.progress.advance(state.global_step, loss=logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        every = self.settings.evaluate_every
        if state.global_step == self.steps or (every and state.global_step % every == 0):
            self._evaluate(state, model)
        if self.is_over(state) or self.context.stop.requested:
            control.should_save = True
            control.should_training_stop = True

    def _evaluate(self, state: Any, model: nn.Module) -> None:
        model.eval()
        loss = self.task.heldout_loss()
        self._log(state, {"heldout_loss": loss})
        if state.best_metric is None or loss < state.best_metric:
            state.best_metric = loss  # in the Trainer's state, so that checkpoints have it
            state.best_global_step = state.global_step
            with new_folder(self.context.checkpoints / BEST) as folder:
                save_tensors(trained_weights(model), folder / TRAINED_WEIGHTS)

    def is_over(self, state: TrainerState) -> bool:
        """Whether the last step is evaluated, or `patience` evaluations have brought no better held-out loss."""
        if state.best_metric is None:
            return False
        if state.global_step == self.steps:
            return True
        if self.settings.patience is None:
            return False
        steps_since_best = state.global_step - (state.best_global_step or 0)
        return steps_since_best >= self.settings.patience * self.settings.evaluate_every

    def _log(self, state: Any, metrics: dict[str, float]) -> None:
        named = {f"{self.task.metric_group}/{name}": value for name, value in metrics.items()}
        self.context.tracker.log(self.context.stage, self.context.first + state.global_step, named)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal the Trainer's checkpoint, under the name that align's checkpoints have."""
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(written)
        publish_folder(written, written.with_name(f"step-{self.context.first + state.global_step}"))
        prune(self.context.checkpoints, self.context.keep)
