"""The learner of a supervised stage: one of its ranks, and all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch

from align.learner.group import Ranks
from align.learner.rank import AnyExample, Rank
from align.learner.state import LearnerState, TrainedWeights
from align.runtime.seeds import seed_for
from align.supervised.objective import Objective
from rewards.schema import FitSettings


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step.

    Attributes:
        metrics: The objective's metrics, and `gradient_norm` before clipping.
        skipped: Whether a gradient was not finite, so that nothing changed.
    """

    metrics: dict[str, float]
    skipped: bool


@dataclass(frozen=True)
class Row(Generic[AnyExample]):
    """An example and its number in the data."""

    number: int
    example: AnyExample

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass."""
        return self.example.length


class SupervisedLearner:
    """One rank of the learner of a supervised stage. All ranks make the same calls in the same order."""

    def __init__(
        self,
        objective: Objective[Any],
        settings: FitSettings,
        zero: int,
        seed: int,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Build the rank around an objective. The default process group must exist.

        Args:
            objective: What is minimised.
            settings: The settings of the optimizer.
            zero: The ZeRO stage.
            seed: Seed of dropout.
            gradient_checkpointing: Whether the backward pass recomputes activations.
        """
        self.objective = objective
        self.seed = seed
        self.steps = settings.optimizer_steps(len(objective.examples))
        self.rank = Rank(objective.module, settings, zero, gradient_checkpointing)
        objective.prepare(self.rank)

    def train(self, numbers: Sequence[int], step: int, factor: float) -> StepResult:
        """Take an optimizer step; dropout is on.

        Args:
            numbers: The examples of the batch, of all ranks.
            step: The step, which dropout depends on.
            factor: The factor of the schedule on the peak learning rates.
        """
        self._set_training(True)
        objective = self.objective
        module = objective.module
        if module.trains_adapter:
            module.trunk.start_step(module.role, (step + 1) / self.steps, seed_for(self.seed, "routes", step))
        rows = [Row(number, objective.examples[number]) for number in numbers]
        examples = [row.example for row in rows]
        weight = objective.weight(examples)
        objective.prepare_batch(self.rank, examples)
        sums = self.rank.backward(rows, weight, [objective.loss], partial(self._collate, step))
        outcome = self.rank.step({name: rate * factor for name, rate in objective.peak_rates.items()})
        norms = {"gradient_norm": outcome.norms[module.role]}
        return StepResult(objective.metrics(sums, weight) | norms, outcome.skipped)

    def tokens_per_microbatch(self) -> int:
        """The most tokens of a microbatch, the same on all ranks."""
        return self.rank.tokens_per_microbatch

    def heldout_metrics(self) -> dict[str, float]:
        """The metrics of the held-out examples, over all ranks, `heldout_loss` among them; dropout is off."""
        self._set_training(False)
        objective = self.objective
        collate = partial(objective.collate_heldout, device=self.rank.device)
        objective.prepare_batch(self.rank, objective.heldout)
        sums = self.rank.evaluate(objective.heldout, objective.heldout_loss, collate)
        return objective.heldout_metrics(sums, objective.weight(objective.heldout))

    def product(self) -> TrainedWeights:
        """The adapter and the heads as they are saved; empty on ranks other than the first, which take part."""
        module = self.objective.module
        product = TrainedWeights()
        if module.trains_adapter:
            product.adapters[module.role] = self.rank.read_adapter(module.trunk, module.role)
        if len(module.heads):
            product.heads[module.role] = self.rank.read_module(module.heads)
        return product if self.rank.number == 0 else TrainedWeights()

    def trained_names(self) -> tuple[list[str], list[str]]:
        """The names of the adapters and heads in `state`."""
        module = self.objective.module
        return list(module.trained_adapters), list(module.trained_heads)

    def state(self) -> LearnerState:
        """A copy of everything that steps change; see `RankState.state`."""
        return self.rank.state()

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage; see `RankState.restore`."""
        self.rank.restore(states, zero)

    def close(self) -> None:
        """Free what the rank holds."""
        self.rank.close()

    def _collate(self, step: int, rows: Sequence[Row[Any]]) -> tuple[Any, ...]:
        """The tensors of a microbatch; what is dropped in it depends on the step and its first row."""
        seed_dropout(seed_for(self.seed, "dropout", step, rows[0].number), self.rank.device)
        return self.objective.collate([row.example for row in rows], self.rank.device)

    def _set_training(self, training: bool) -> None:
        """As `nn.Module.train`, but free where the mode stays the same."""
        module = self.objective.module
        if module.training != training:
            module.train(training)


class SupervisedLearners:
    """All ranks of the learner of a supervised stage, wherever they are."""

    def __init__(self, ranks: Ranks[SupervisedLearner]) -> None:
        self.ranks = ranks

    def train(self, numbers: Sequence[int], step: int, factor: float) -> StepResult:
        """Take an optimizer step; see `SupervisedLearner.train`. The result is the same of every rank."""
        return self.ranks.call(SupervisedLearner.train, numbers, step, factor)[0]

    def tokens_per_microbatch(self) -> int:
        """The most tokens of a microbatch."""
        return self.ranks.call(SupervisedLearner.tokens_per_microbatch)[0]

    def heldout_metrics(self) -> dict[str, float]:
        """The metrics of the held-out examples, `heldout_loss` among them."""
        return self.ranks.call(SupervisedLearner.heldout_metrics)[0]

    def product(self) -> TrainedWeights:
        """The adapter and the heads as they are saved, on the CPU."""
        return self.ranks.call(SupervisedLearner.product)[0]

    def trained_names(self) -> tuple[list[str], list[str]]:
        """The names of the adapters and heads in `state`."""
        return self.ranks.call(SupervisedLearner.trained_names)[0]

    def state(self) -> Sequence[LearnerState]:
        """The state of each rank, for a checkpoint; see `Ranks.call_and_keep`."""
        return self.ranks.call_and_keep(SupervisedLearner.state)

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage.

        Bit for bit where the number of ranks and the stage are the same as now.
        """
        self.ranks.call(SupervisedLearner.restore, list(states), zero)

    def close(self) -> None:
        """Free the resources of all ranks."""
        self.ranks.close()


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed what modules on a device draw; `torch.manual_seed` also formats the call stack for each absent accelerator.

    Args:
        seed: The seed.
        device: The device, a CPU or a GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def build_learner(
    build_objective: Callable[[], Objective[Any]],
    settings: FitSettings,
    zero: int,
    seed: int,
    gradient_checkpointing: bool,
) -> SupervisedLearner:
    """Build an objective and a rank around it; arguments as of `SupervisedLearner`."""
    return SupervisedLearner(build_objective(), settings, zero, seed, gradient_checkpointing)
