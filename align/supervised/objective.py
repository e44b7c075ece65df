"""What a supervised stage minimises."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic

import torch
from torch import Tensor, nn

from align.learner.rank import AnyExample, Rank
from align.roles.trained import TrainedModule
from policies.trunk import Trunk


class Objective(ABC, Generic[AnyExample]):
    """A loss that is a sum over tokens or examples, divided by their number in the whole batch.

    Attributes:
        module: What is trained.
        examples: The training examples.
        heldout: Held-out examples.
        peak_rates: The peak learning rate of each role, and of each parameter group that has its own.
    """

    module: "SupervisedModule"
    examples: Sequence[AnyExample]
    heldout: Sequence[AnyExample]
    peak_rates: Mapping[str, float]

    def prepare(self, rank: Rank) -> None:
        """Compute what the examples need of the model before its first step; all ranks call it, dropout is off."""

    def prepare_batch(self, rank: Rank, examples: Sequence[AnyExample]) -> None:
        """Compute what the loss needs of all examples of a batch; all ranks call it before `loss`."""

    @abstractmethod
    def weight(self, examples: Sequence[AnyExample]) -> float:
        """The number of tokens or examples by which the summed loss is divided."""

    @abstractmethod
    def collate(self, examples: Sequence[AnyExample], device: torch.device) -> tuple[Any, ...]:
        """The tensors of a microbatch of training examples."""

    @abstractmethod
    def loss(self, module: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        """The summed loss `[]` of a microbatch and its statistics, see `MicrobatchObjective`."""

    def collate_heldout(self, examples: Sequence[AnyExample], device: torch.device) -> tuple[Any, ...]:
        """The tensors of a microbatch of held-out examples."""
        return self.collate(examples, device)

    def heldout_loss(self, module: Any, *tensors: Any) -> tuple[Tensor, Tensor]:
        """As `loss`, of held-out examples, with the statistics that `heldout_metrics` takes."""
        return self.loss(module, *tensors)

    def heldout_metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The metrics of the held-out examples from the statistics, `heldout_loss` among them.

        By default the only statistic `[]` is the summed loss.
        """
        return {"heldout_loss": float(sums) / weight}

    @abstractmethod
    def metrics(self, sums: Tensor, weight: float) -> dict[str, float]:
        """The metrics of a step from the statistics, summed over the batch, and its weight; `loss` among them."""


class SupervisedModule(TrainedModule):
    """The module of a supervised stage: a role of a trunk, and what is trained with its adapter.

    Attributes:
        trunk: The base model.
        role: The role that is trained.
        trains_adapter: Whether its adapter is trained, or the heads alone.
        heads: Heads on the role's hidden states, part of the product.
        loss_parameters: Trained parameters of the loss, which is not part of the product.
    """

    def __init__(
        self,
        trunk: Trunk,
        role: str,
        trains_adapter: bool = True,
        heads: nn.ModuleList | None = None,
        loss_parameters: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.role = role
        self.trains_adapter = trains_adapter
        self.heads = heads or nn.ModuleList()
        self.loss_parameters = loss_parameters or nn.Module()

    @property
    def trunks(self) -> list[Trunk]:
        return [self.trunk]

    @property
    def trained_adapters(self) -> dict[str, Trunk]:
        is_made = self.trunk.encoder(self.role) is not None
        return {self.role: self.trunk} if self.trains_adapter and not is_made else {}

    @property
    def trained_heads(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module | None] = {
            self.role: self.heads,
            f"{self.role}.loss": self.loss_parameters,
            f"{self.role}.encoder": self.trunk.encoder(self.role) if self.trains_adapter else None,
        }
        heads = {name: module for name, module in named.items() if module is not None and has_parameters(module)}
        state = self.trunk.step_state(self.role) if self.trains_adapter else None
        return heads if state is None else heads | {f"{self.role}.steps": state}


def has_parameters(module: nn.Module) -> bool:
    """Whether a module has a parameter. Its size does not matter: at ZeRO 3 a partitioned one has no elements."""
    return next(module.parameters(), None) is not None
