"""Supervised training on transformers' Trainer, with checkpoints and metrics of our own form."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.checkpoint import latest, prune, seal
from align.interrupt import Interrupted, Stop
from align.ppo.optimizer import warmed
from align.progress import Progress
from align.seeds import seed_for
from align.tracking import Tracker
from policies.lora import by_rate
from rewards.schema import FitSettings

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class StageContext:
    """What a supervised stage needs besides its model and data."""

    stage: str
    checkpoints: Path
    keep: int
    seed: int
    tracker: Tracker
    stop: Stop


class Row(Protocol):
    """What is trained on: a demonstration, a pair."""

    @property
    def length(self) -> int:
        """Its tokens; rows are batched with others of about as many."""


class Objective(nn.Module):
    """What a supervised stage minimises."""

    def train(self, mode: bool = True) -> Self:
        """As of any module. The Trainer asks for it at every step, and many modules are slow to walk through."""
        return self if self.training == mode else super().train(mode)


def fit(
    objective: Objective,
    rows: Sequence[Row],
    collate: Callable[[list[Any]], dict[str, Any]],
    settings: FitSettings,
    context: StageContext,
    metrics: str,
    lora_plus: float | None = None,
) -> int:
    """Train the parameters of `objective` that require gradients. Returns the number of optimizer steps.

    objective: gives {"loss": …}, a sum over its microbatch divided by `num_items_in_batch`, the number of `labels`
    in the whole batch. metrics: the first part of the names that are logged. Batches are of rows of about one length.
    lora_plus: `policy.lora_plus`.
    Goes on from the last checkpoint where there is one. Raises Interrupted after a checkpoint if asked to stop.
    """
    objective.eval()  # whatever its parts were in, the Trainer's first `train` now reaches them
    objective.accepts_loss_kwargs = True  # type: ignore[assignment]  # Trainer's way to ask for num_items_in_batch
    microbatch = settings.microbatch or settings.batch
    steps = optimizer_steps(len(rows), settings)
    arguments = TrainingArguments(
        output_dir=str(context.checkpoints),
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=settings.batch // microbatch,
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=warmed(settings.schedule),
        warmup_steps=round(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
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
    with Progress(context.stage, steps) as progress:
        trainer = _Trainer(
            model=objective,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            optimizers=(_optimizer(objective, settings, lora_plus), None),
            callbacks=[_Watch(context, metrics, progress)],
        )
        trainer.remove_callback(PrinterCallback)
        last = latest(context.checkpoints)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if context.stop.requested:
        raise Interrupted
    objective.eval()
    return steps


def _optimizer(objective: nn.Module, settings: FitSettings, lora_plus: float | None) -> Optimizer | None:
    """None leaves it to the Trainer."""
    if lora_plus is None:
        return None
    trained = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    groups = by_rate(trained, lora_plus)
    rated = [{"params": parameters, "lr": settings.learning_rate * factor} for factor, parameters in groups]
    return AdamW(rated, weight_decay=settings.weight_decay, fused=True)


def optimizer_steps(rows: int, settings: FitSettings) -> int:
    """How many optimizer steps a stage takes over so many rows; the last batch of an epoch may be smaller."""
    return math.ceil(math.ceil(rows / settings.batch) * settings.epochs)


class LengthGroups(Sampler[int]):
    """Rows in random order, but such that those of a batch are of about one length: little of it is padding."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed = lengths, batch, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """The order is a function of seed and epoch alone, so that a stage that is resumed finds its place."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", self.epoch))
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))


class _Trainer(Trainer):
    """A Trainer that groups rows by length, and whose checkpoints hold what is trained and not the frozen base."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroups:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([row.length for row in self.train_dataset], batch, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(saved[name])


class _Watch(TrainerCallback):
    """Logs every step, seals checkpoints, and ends training when asked to."""

    def __init__(self, context: StageContext, metrics: str, progress: Progress) -> None:
        self.context, self.metrics, self.progress = context, metrics, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            loss, rate = logs["loss"], logs["learning_rate"]
            self.context.tracker.log(
                self.context.stage,
                state.global_step,
                {
                    f"{self.metrics}/loss": loss,
                    f"{self.metrics}/learning_rate": rate,
                    f"{self.metrics}/gradient_norm": logs["grad_norm"],
                },
            )
            self.progress.advance(state.global_step, loss=loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.context.stop.requested:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        seal(written)
        target = written.with_name(f"step-{state.global_step}")
        shutil.rmtree(target, ignore_errors=True)
        written.rename(target)
        prune(self.context.checkpoints, self.context.keep)
