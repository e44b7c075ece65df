"""A Trainer that cuts batches into passes without padding, and whose checkpoints are of our own form."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from align.runtime.failures import Fault
from align.runtime.seeds import seed_for
from align.supervised.trainer_state import read_optimizer, read_random, write_optimizer, write_random
from policies.files.safe_reading import check_names_and_shapes, read_tensors

WEIGHTS = "model.safetensors"
"""What is trained, in a checkpoint."""


class TrainingExample(Protocol):
    """What is trained on: a demonstration, a pair."""

    @property
    def length(self) -> int:
        """Its tokens; rows are batched with others of about as many."""


class Objective(nn.Module):
    """What a supervised stage minimises."""

    def train(self, mode: bool = True) -> Self:
        """As of any module. The Trainer asks for it at every step, and many modules are slow to walk through."""
        return self if self.training == mode else super().train(mode)


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


class FitTrainer(Trainer):
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


def split_microbatches(
    collate: Callable[[list[Any]], dict[str, Any]],
    microbatches: Callable[[Sequence[int], int | None], list[list[int]]],
    tokens: int | None,
    rows: list[TrainingExample],
) -> dict[str, Any]:
    """A batch, cut into passes."""
    parts = [collate([rows[i] for i in group]) for group in microbatches([row.length for row in rows], tokens)]
    return {"labels": torch.cat([part["labels"] for part in parts]), "passes": parts}


def trained(objective: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained, by name."""
    return {n: p.detach().cpu().clone() for n, p in objective.named_parameters() if p.requires_grad}


@torch.no_grad()
def read_trained(objective: nn.Module, path: Path) -> None:
    """Overwrite what is trained by a file's. Raises UserError where it cannot be read or is of another model."""
    weights, own = read_tensors(path), {n: p for n, p in objective.named_parameters() if p.requires_grad}
    check_names_and_shapes(weights, own, path)
    for name, parameter in own.items():
        parameter.copy_(weights[name])
