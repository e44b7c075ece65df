"""An objective that needs no base model, and what `fit` needs around an objective."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align.learner.group import LocalRank
from align.runs.tracking import Tracker
from align.runtime.signals import StopRequest
from align.supervised.fit import FitContext
from align.supervised.learner import SupervisedLearner, SupervisedLearners
from align.supervised.objective import Objective, SupervisedModule
from policies.schema import PolicySettings
from policies.trunk import Trunk
from rewards.schema import FitSettings


@dataclass(frozen=True)
class ToyExample:
    number: int
    length: int = 1


class Weight(nn.Module):
    """Two zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self) -> Tensor:
        """The weight `[2]`; outside of a forward pass, ZeRO 3 has it in parts."""
        return self.weight * 1.0


class ToyModule(SupervisedModule):
    """A weight, without a base model."""

    def __init__(self) -> None:
        trunk: Any = None
        super().__init__(trunk, "toy", trains_adapter=False, heads=nn.ModuleList([Weight()]))

    @property
    def trunks(self) -> list[Trunk]:
        return []

    @property
    def trained_adapters(self) -> dict[str, Trunk]:
        return {}

    def default_microbatch_tokens(self) -> int:
        return 1

    def microbatches(self, lengths: Sequence[int], tokens: int | None = None) -> list[list[int]]:
        return [list(range(len(lengths)))]


@dataclass
class ToyObjective(Objective[ToyExample]):
    """A loss that is linear in the weight.

    Attributes:
        examples: The examples.
        gradients: The gradient of each element of the weight, in order of the steps.
        heldout_losses: The held-out losses, in order of the evaluations.
        rate: Peak learning rate.
        seen: The examples of each step.
        weights: The weight before each step.
    """

    examples: Sequence[ToyExample]
    gradients: Iterator[float] = field(default_factory=lambda: repeat(1.0))
    heldout_losses: Iterator[float] = field(default_factory=lambda: repeat(0.0))
    rate: float = 0.1
    seen: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.module: ToyModule = ToyModule()
        self.heldout = [ToyExample(0)]
        self.peak_rates = {"toy": self.rate}

    def weight(self, examples: Sequence[ToyExample]) -> float:
        return len(examples)

    def collate(self, examples: Sequence[ToyExample], device: torch.device) -> tuple[int, float]:
        self.seen.append([example.number for example in examples])
        return len(examples), next(self.gradients)

    def loss(self, module: ToyModule, count: int, gradient: float) -> tuple[Tensor, Tensor]:
        weight = module.heads[0]()
        self.weights.append(weight.tolist())
        loss = count * gradient * weight.sum()
        return loss, loss.detach()

    def collate_heldout(self, examples: Sequence[ToyExample], device: torch.device) -> tuple[Tensor]:
        return (torch.tensor(next(self.heldout_losses), device=device),)

    def heldout_loss(self, module: ToyModule, loss: Tensor) -> tuple[Tensor, Tensor]:
        return loss, loss

    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        return {"loss": float(sums) / weight}


@contextmanager
def local_learners(
    build: Callable[[], Objective[Any]], settings: FitSettings, zero: int = 0, seed: int = 0, recompute: bool = False
) -> Iterator[SupervisedLearners]:
    """The learner of an objective, with one rank in this process."""
    ranks = LocalRank(lambda: SupervisedLearner(build(), settings, zero, seed, recompute))
    try:
        yield SupervisedLearners(ranks)
    finally:
        ranks.close()


def context_in(folder: Path, **changed: Any) -> FitContext:
    """The context of a training run in a folder."""
    folder.mkdir(exist_ok=True)
    values: dict[str, Any] = {
        "stage": "sft",
        "metric_group": "sft",
        "checkpoints": folder / "checkpoints",
        "keep": 2,
        "seed": 0,
        "tracker": Tracker(folder),
        "stop": StopRequest(),
        "policy": PolicySettings(),
        "base": "base",
    }
    return FitContext(**values | changed)
