"""Supervised training on transformers' Trainer, with checkpoints and metrics of our own form."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PrinterCallback, TrainerCallback, TrainerState, TrainingArguments

from align.learner.schedules import warmed
from align.runs.checkpoint import latest, prune, seal, step_of
from align.runs.tracking import Tracker
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.progress import ProgressBar
from align.runtime.seeds import seed_for
from align.runtime.signals import Interrupted, StopRequest
from align.supervised.trainer import (
    WEIGHTS,
    FitTrainer,
    Objective,
    SkipNonFinite,
    TrainingExample,
    read_trained,
    split_microbatches,
    trained,
)
from align.supervised.trainer_state import read_state
from policies.errors import UserError
from policies.files.safe_reading import read_object
from policies.layers.lora import parameter_groups_by_rate
from rewards.schema import FitSettings

BEST = "best"


@dataclass(frozen=True)
class FitContext:
    """What a supervised stage needs besides its model and data. first: the stage's steps before this training."""

    stage: str
    checkpoints: Path
    keep: int
    seed: int
    tracker: Tracker
    stop: StopRequest
    first: int = 0


@dataclass(frozen=True)
class FitResult:
    """What came of a training. steps: optimizer steps done; best_step: that of the weights that were kept."""

    steps: int
    best_step: int
    heldout_loss: float


def fit(
    objective: Objective,
    rows: Sequence[TrainingExample],
    collate: Callable[[list[Any]], dict[str, Any]],
    settings: FitSettings,
    context: FitContext,
    metrics: str,
    heldout: Callable[[], float],
    microbatches: Callable[[Sequence[int], int | None], list[list[int]]],
    lora_plus: float | None = None,
) -> FitResult:
    """Train the parameters of `objective` that require gradients; it then holds those of the best held-out loss.

    collate: from rows to the arguments of one pass of `objective`, which gives {"loss": …}, a sum over these rows
    divided by `num_items_in_batch`, the number of `labels` in the whole batch. Batches are of rows of about one length.
    microbatches: how a batch is cut, see `Trunk.microbatches`. metrics: the first part of the names that are logged.
    heldout: the loss of `objective` on held-out rows, asked for every `evaluate_every` steps and at the end.
    lora_plus: `policy.lora_plus`.
    Goes on from the last checkpoint where there is one. Raises Interrupted after a checkpoint if asked to stop.
    """
    done = context.checkpoints / f"done-{context.first}"
    if done.is_dir():
        read_trained(objective, done / WEIGHTS)
        return _read_fitted(done / "fitted.json")
    objective.eval()  # whatever its parts were in, the Trainer's first `train` now reaches them
    objective.accepts_loss_kwargs = True  # type: ignore[assignment]  # Trainer's way to ask for num_items_in_batch
    steps = optimizer_steps(len(rows), settings)
    watch = _Watch(context, metrics, settings, steps, heldout)
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
        seed=seed_for(context.seed, context.stage) % 2**32,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # the objective is one module on one device; no DataParallel
    with ProgressBar(context.stage, steps) as progress:
        trainer = FitTrainer(
            model=objective,
            args=arguments,
            train_dataset=rows,
            data_collator=partial(split_microbatches, collate, microbatches, settings.tokens_per_microbatch),
            optimizers=(_optimizer(objective, settings, lora_plus), None),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer().register_step_pre_hook(SkipNonFinite(settings.max_skipped, context.stage))
        watch.progress = progress
        last = latest(context.checkpoints)
        begun = last is not None and step_of(last) > context.first
        state = read_state(last) if last and begun else trainer.state
        if not watch.ended(state):
            trainer.train(resume_from_checkpoint=str(last) if begun else None)
            state = trainer.state
    objective.eval()
    if not watch.ended(state):
        raise Interrupted
    assert state.best_metric is not None  # the last step is always looked at
    read_trained(objective, context.checkpoints / BEST / WEIGHTS)
    fitted = FitResult(state.global_step, state.best_global_step, state.best_metric)
    with new_folder(done) as folder:
        save_file(trained(objective), folder / WEIGHTS)
        write_json(folder / "fitted.json", asdict(fitted))
    if context.stop.requested:
        raise Interrupted
    return fitted


def _read_fitted(path: Path) -> FitResult:
    values = read_object(path)
    try:
        return FitResult(int(values["steps"]), int(values["best_step"]), float(values["heldout_loss"]))
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _optimizer(objective: nn.Module, settings: FitSettings, lora_plus: float | None) -> Optimizer | None:
    """None leaves it to the Trainer."""
    if lora_plus is None:
        return None
    trained = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    groups = parameter_groups_by_rate(trained, lora_plus)
    rated = [{"params": parameters, "lr": settings.learning_rate * factor} for factor, parameters in groups]
    return AdamW(rated, weight_decay=settings.weight_decay, fused=True)


def optimizer_steps(rows: int, settings: FitSettings) -> int:
    """How many optimizer steps a stage takes over so many rows; the last batch of an epoch may be smaller."""
    return math.ceil(math.ceil(rows / settings.batch_size) * settings.epochs)


class _Watch(TrainerCallback):
    """Logs every step, looks at the held-out loss, seals checkpoints, and ends training when it is time to."""

    progress: ProgressBar

    def __init__(
        self, context: FitContext, metrics: str, settings: FitSettings, steps: int, heldout: Callable[[], float]
    ) -> None:
        self.context, self.metrics, self.settings = context, metrics, settings
        self.steps, self.heldout = steps, heldout

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            loss, rate = logs["loss"], logs["learning_rate"]
            self._log(state, {"loss": loss, "learning_rate": rate, "gradient_norm": logs["grad_norm"]})
            self.progress.advance(state.global_step, loss=loss)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        every = self.settings.evaluate_every
        if state.global_step == self.steps or (every and state.global_step % every == 0):
            model.eval()
            loss = self.heldout()
            self._log(state, {"heldout_loss": loss})
            if state.best_metric is None or loss < state.best_metric:
                # In the state, so that it is in the checkpoint.
                state.best_metric, state.best_global_step = loss, state.global_step
                with new_folder(self.context.checkpoints / BEST) as folder:
                    save_file(trained(model), folder / WEIGHTS)
        if self.ended(state):
            control.should_save = control.should_training_stop = True
        if self.context.stop.requested:
            control.should_save = control.should_training_stop = True

    def ended(self, state: TrainerState) -> bool:
        """Whether the last step is done, or too many looks have gone by without a better held-out loss."""
        looked, patience = state.best_metric is not None, self.settings.patience
        waited = state.global_step - (state.best_global_step or 0)
        given_up = looked and patience is not None and waited >= patience * self.settings.evaluate_every
        return given_up or (looked and state.global_step == self.steps)

    def _log(self, state: Any, figures: dict[str, float]) -> None:
        named = {f"{self.metrics}/{name}": value for name, value in figures.items()}
        self.context.tracker.log(self.context.stage, self.context.first + state.global_step, named)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(written)
        target = written.with_name(f"step-{self.context.first + state.global_step}")
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
        prune(self.context.checkpoints, self.context.keep)
