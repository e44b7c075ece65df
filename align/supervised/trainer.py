"""A Trainer that splits batches into microbatches without padding, and writes no pickles."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer

from align.runtime.failures import Fault
from align.supervised.batches import LengthBatches
from align.supervised.trainer_state import read_optimizer, read_random, write_optimizer, write_random
from policies.files.safe_reading import check_names_and_shapes, read_tensors
from policies.files.writing import save_tensors

TRAINED_WEIGHTS = "model.safetensors"
"""The file of the trained weights in a checkpoint."""


class TrainingExample(Protocol):
    """An example that a stage trains on: a demonstration or a preference example."""

    @property
    def length(self) -> int:
        """Number of tokens; batches are made of examples of similar length."""


Collate = Callable[[list[Any]], dict[str, Any]]
"""Turns the examples of a microbatch into the objective's arguments, `labels` among them."""

SplitByLength = Callable[[Sequence[int], int | None], list[list[int]]]
"""Splits a batch, given the lengths of its examples and the tokens per microbatch, into indices for each microbatch."""


class Objective(nn.Module):
    """The module whose output a supervised stage minimises."""

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but free where the mode stays the same: the Trainer calls it at every step."""
        return self if self.training == mode else super().train(mode)


class FitTrainer(Trainer):
    """A Trainer that groups examples by length, and leaves the frozen base model out of its checkpoints."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of an epoch; the Trainer's own sampler would leave a small one over."""
        lengths = [example.length for example in self.train_dataset]
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,
            batch_sampler=LengthBatches(lengths, self.args.train_batch_size, self.args.seed),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch; its gradient is accumulated over the microbatches."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for microbatch in inputs["microbatches"]:
            loss = model(**self._prepare_inputs(microbatch), num_items_in_batch=num_items_in_batch)["loss"]
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(trained_weights(self.model), folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_trained_weights(model or self.model, Path(resume_from_checkpoint) / TRAINED_WEIGHTS)

    # The Trainer itself would write everything below as pickles.

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
        """There is no gradient scaler: trained weights are float32."""


class SkipNonFinite:
    """A hook before each optimizer step that skips those with a non-finite gradient, which would ruin the weights."""

    def __init__(self, limit: int, stage: str) -> None:
        """Set the limit.

        Args:
            limit: Number of consecutive skipped steps at which it raises Fault.
            stage: Name of the stage, for the message.
        """
        self.limit = limit
        self.stage = stage
        self.in_a_row = 0

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        parameters: list[Any] = _with_gradients(optimizer)
        norm = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters])).sum()
        if torch.isfinite(norm):
            self.in_a_row = 0
            return
        for parameter in parameters:
            parameter.grad = None
        self.in_a_row += 1
        if self.in_a_row == self.limit:
            raise Fault(f"the gradient was not finite in {self.limit} consecutive steps ({self.stage}.max_skipped)")


def _with_gradients(optimizer: Optimizer) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += [parameter for parameter in group["params"] if parameter.grad is not None]
    return parameters


def split_microbatches(
    collate: Collate, split: SplitByLength, tokens: int | None, examples: list[TrainingExample]
) -> dict[str, Any]:
    """A batch as the Trainer expects it: its microbatches, and the `labels` of all of them for it to count."""
    groups = split([example.length for example in examples], tokens)
    microbatches = []
    for indices in groups:
        microbatches.append(collate([examples[i] for i in indices]))
    labels = torch.cat([microbatch["labels"] for microbatch in microbatches])
    return {"labels": labels, "microbatches": microbatches}


def trained_weights(objective: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that require gradients, on the CPU, by name."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _trained(objective).items()}


@torch.no_grad()
def read_trained_weights(objective: nn.Module, path: Path) -> None:
    """Load what `trained_weights` returned from a file. Raises UserError where it is unreadable or of another model."""
    weights = read_tensors(path)
    parameters = _trained(objective)
    check_names_and_shapes(weights, parameters, path)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def _trained(objective: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}
