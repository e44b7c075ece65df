"""Supervised training on transformers' Trainer, with checkpoints and metrics of our own form."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.checkpoint import latest, prune, seal, step_of
from align.failures import Fault
from align.files import new_folder, write_json
from align.fit_state import read_optimizer, read_random, read_state, write_optimizer, write_random
from align.interrupt import Interrupted, Stop
from align.ppo.optimizer import warmed
from align.progress import Progress
from align.seeds import seed_for
from align.tracking import Tracker
from policies.errors import UserError
from policies.lora import by_rate
from policies.reading import check_like, read_object, read_tensors
from rewards.schema import FitSettings

WEIGHTS = "model.safetensors"
BEST = "best"


@dataclass(frozen=True)
class StageContext:
    """What a supervised stage needs besides its model and data. first: the stage's steps before this training."""

    stage: str
    checkpoints: Path
    keep: int
    seed: int
    tracker: Tracker
    stop: Stop
    first: int = 0


@dataclass(frozen=True)
class Fitted:
    """What came of a training. steps: optimizer steps done; best_step: that of the weights that were kept."""

    steps: int
    best_step: int
    heldout_loss: float


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
    heldout: Callable[[], float],
    passes: Callable[[Sequence[int], int | None], list[list[int]]],
    lora_plus: float | None = None,
) -> Fitted:
    """Train the parameters of `objective` that require gradients; it then holds those of the best held-out loss.

    collate: from rows to the arguments of one pass of `objective`, which gives {"loss": …}, a sum over these rows
    divided by `num_items_in_batch`, the number of `labels` in the whole batch. Batches are of rows of about one length.
    passes: how a batch is cut, see `Trunk.passes`. metrics: the first part of the names that are logged.
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
        per_device_train_batch_size=settings.batch,
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
            data_collator=partial(_cut, collate, passes, settings.tokens_per_microbatch),
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
    fitted = Fitted(state.global_step, state.best_global_step, state.best_metric)
    with new_folder(done) as folder:
        save_file(trained(objective), folder / WEIGHTS)
        write_json(folder / "fitted.json", asdict(fitted))
    if context.stop.requested:
        raise Interrupted
    return fitted


def _cut(
    collate: Callable[[list[Any]], dict[str, Any]],
    passes: Callable[[Sequence[int], int | None], list[list[int]]],
    tokens: int | None,
    rows: list[Row],
) -> dict[str, Any]:
    """A batch, cut into passes."""
    parts = [collate([rows[i] for i in group]) for group in passes([row.length for row in rows], tokens)]
    return {"labels": torch.cat([part["labels"] for part in parts]), "passes": parts}


def trained(objective: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, by name."""
    return {n: p.detach().cpu().clone() for n, p in objective.named_parameters() if p.requires_grad}


@torch.no_grad()
def read_trained(objective: nn.Module, path: Path) -> None:
    """Overwrite what is trained by a file's. Raises UserError where it cannot be read or is of another model."""
    weights, own = read_tensors(path), {n: p for n, p in objective.named_parameters() if p.requires_grad}
    check_like(weights, own, path)
    for name, parameter in own.items():
        parameter.copy_(weights[name])


def _read_fitted(path: Path) -> Fitted:
    values = read_object(path)
    try:
        return Fitted(int(values["steps"]), int(values["best_step"]), float(values["heldout_loss"]))
    except (LookupError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


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


class SkipNonFinite:
    """Leaves out steps whose gradient is not finite: they would end all training. To be called before each step."""

    def __init__(self, limit: int, stage: str) -> None:
        """limit: such steps in a row at which it raises Fault."""
        self.limit, self.stage, self.in_a_row = limit, stage, 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack(torch._foreach_norm([p.grad for p in parameters])).sum()
        if torch.isfinite(norm):
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.in_a_row += 1
        if self.in_a_row == self.limit:
            raise Fault(f"the gradient was not finite in {self.limit} steps in a row ({self.stage}.max_skipped)")


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
        return LengthGroups([row.length for row in self.train_dataset], self.args.train_batch_size, self.args.seed)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch, its gradient added up pass by pass."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for part in inputs["passes"]:
            loss = model(**self._prepare_inputs(part), num_items_in_batch=num_items_in_batch)["loss"]
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained(self.model), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_trained(model or self.model, Path(resume_from_checkpoint) / WEIGHTS)

    # The Trainer's own forms of all below are pickles.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            read_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        write_random(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            read_random(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: what is trained is float32."""


class _Watch(TrainerCallback):
    """Logs every step, looks at the held-out loss, seals checkpoints, and ends training when it is time to."""

    progress: Progress

    def __init__(
        self, context: StageContext, metrics: str, settings: FitSettings, steps: int, heldout: Callable[[], float]
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
