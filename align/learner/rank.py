"""One rank of a learner: a DeepSpeed engine around what it trains, whatever the objective."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.learner.engine import destroy_engine, make_deepspeed_engine
from align.learner.group import deal_by_length
from align.learner.optimizer import RoleClip, make_optimizer
from align.learner.state import LearnerState, RankState
from align.roles.trained import TrainedModule, role_of_group
from align.runtime.failures import MicrobatchTooLarge, is_out_of_memory
from policies.errors import first_line
from policies.flops import Utilization, peak_flops, training_flops
from policies.schema import OptimizerSettings
from policies.trunk import AdapterWeights, Trunk


class TrainingExample(Protocol):
    """An example that an objective is computed on."""

    @property
    def length(self) -> int:
        """Number of its tokens in a forward pass."""


AnyExample = TypeVar("AnyExample", bound=TrainingExample)

MicrobatchObjective = Callable[..., tuple[Tensor, Tensor]]
"""Maps the trained module and the tensors of a microbatch to the loss `[]`, the weighted sum over its tokens or
examples, and to statistics without a gradient that are summed in the same way."""


@dataclass(frozen=True)
class StepOutcome:
    """What happened in an optimizer step.

    Attributes:
        norms: Gradient norm of each role, before clipping.
        skipped: Whether a gradient was not finite, so that nothing changed.
    """

    norms: dict[str, float]
    skipped: bool


class Rank:
    """Accumulates gradients over microbatches and takes optimizer steps, together with all other ranks.

    All ranks make the same calls in the same order.

    Attributes:
        number: The number of this rank.
        count: The number of ranks.
        tokens_per_microbatch: The most tokens of a microbatch, the same on all ranks.
        module: What is trained, in evaluation mode at first.
        engine: DeepSpeed's engine around it: `engine(function, ...)` calls `function(module, ...)`.
        device: The device of the module.
    """

    def __init__(
        self, module: TrainedModule, settings: OptimizerSettings, zero: int, gradient_checkpointing: bool
    ) -> None:
        """Build the optimizer and the engine. The default process group must exist.

        Args:
            module: What is trained.
            settings: The settings of the optimizer and the microbatches.
            zero: The ZeRO stage.
            gradient_checkpointing: Whether the backward pass recomputes activations.
        """
        self.number = dist.get_rank()
        self.count = dist.get_world_size()
        self.settings = settings
        self.zero = zero
        groups = module.groups()
        sizes = []  # read before ZeRO 3 partitions the parameters
        for group in groups:
            sizes.append([parameter.numel() for parameter in group.parameters])
        self.optimizer = make_optimizer(settings, groups)
        if zero == 0:
            self.optimizer.register_step_pre_hook(module.before_step)  # before the hook that clips
            self.optimizer.register_step_post_hook(module.after_step)
        if zero == 3:
            for trunk in module.trunks:
                trunk.use_module_forwards()
        self.clip = RoleClip(settings.max_grad_norm)
        self.engine = make_deepspeed_engine(module, self.optimizer, zero, self.clip)
        self.device: torch.device = self.engine.device
        self.module = module.eval()
        self.tokens_per_microbatch = settings.tokens_per_microbatch or self._default_tokens_per_microbatch()
        self._state = RankState(module, sizes, self.engine, self.optimizer, zero)
        if gradient_checkpointing:
            for trunk in module.trunks:
                trunk.enable_gradient_checkpointing()

    def backward(
        self,
        examples: Sequence[AnyExample],
        weight: float,
        objectives: Sequence[MicrobatchObjective],
        collate: Callable[[Sequence[AnyExample]], tuple[Any, ...]],
        maxima: int = 0,
    ) -> Tensor:
        """Accumulate the gradient of the objectives' sum over all examples of all ranks, divided by `weight`.

        Args:
            examples: The examples of all ranks, of which this one takes its share.
            weight: Divisor of the summed losses of all examples.
            objectives: The objectives, which are differentiated one after another.
            collate: Turns examples into the tensors of a microbatch that an objective takes.
            maxima: How many of the last statistics are maxima, which must not be negative.

        Returns:
            The statistics of the objectives, `[S]` or `[]` float64, on the CPU: sums over microbatches and ranks, and
            of the last ones the maxima.
        """
        # DeepSpeed averages over ranks, and the loss is a mean over the tokens of all ranks.
        scale = self.count / weight

        def accumulate(objective: MicrobatchObjective, tensors: tuple[Any, ...], is_filler: bool) -> Tensor:
            loss, statistics = self._forward(objective, tensors)
            self.engine.backward(loss * (0.0 if is_filler else scale))
            return statistics

        return self._reduce(examples, objectives, collate, accumulate, maxima)

    @torch.no_grad()
    def evaluate(
        self,
        examples: Sequence[AnyExample],
        objective: MicrobatchObjective,
        collate: Callable[[Sequence[AnyExample]], tuple[Any, ...]],
    ) -> Tensor:
        """The statistics of an objective over all examples of all ranks, as `backward` returns them."""

        def run(objective: MicrobatchObjective, tensors: tuple[Any, ...], is_filler: bool) -> Tensor:
            _, statistics = self._forward(objective, tensors)
            return statistics

        return self._reduce(examples, [objective], collate, run, maxima=0)

    def _forward(self, objective: MicrobatchObjective, tensors: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Loss and statistics of an objective, under DeepSpeed's hooks."""
        loss, statistics = self.engine(objective, *tensors)
        return loss, statistics

    def _reduce(
        self,
        examples: Sequence[AnyExample],
        objectives: Sequence[MicrobatchObjective],
        collate: Callable[[Sequence[AnyExample]], tuple[Any, ...]],
        run: Callable[[MicrobatchObjective, tuple[Any, ...], bool], Tensor],
        maxima: int,
    ) -> Tensor:
        """Run the objectives on this rank's share of the examples, and reduce their statistics over all ranks."""
        lengths = [example.length for example in examples]
        dealt = deal_by_length(lengths, self.count)
        share = dealt[self.number]
        microbatches = self.microbatches([lengths[i] for i in share])
        # Fillers keep this rank in step with the others; their weight is 0.
        fillable_share = share or dealt[0][:1]
        parts = []
        for number, positions in enumerate(self.same_count_on_all_ranks(microbatches)):
            microbatch = [examples[fillable_share[position]] for position in positions]
            is_filler = number >= len(microbatches)
            with self.memory_for([example.length for example in microbatch]):
                tensors = collate(microbatch)
                for objective in objectives:
                    statistics = run(objective, tensors, is_filler)
                    parts.append(statistics.double() * (not is_filler))
        passes = torch.stack(parts)  # [passes, S] or [passes]
        statistics = self._over_ranks(passes.sum(0), dist.ReduceOp.SUM)
        if maxima:
            statistics[-maxima:] = self._over_ranks(passes[:, -maxima:].amax(0), dist.ReduceOp.MAX)
        return statistics.cpu()

    def utilization(self) -> Utilization | None:
        """Tells how much of their peak all ranks use in training; None where the peak or the work is not known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = peak_flops(name, self.module.trunks[0].causal.dtype, torch.backends.cuda.matmul.allow_tf32)
        work = [training_flops(trunk, role) for role, trunk in self.module.trained_adapters.items()]
        known = [flops for flops in work if flops is not None]
        if peak is None or not work or len(known) < len(work):
            return None
        return Utilization(known, peak * self.count)

    def step(self, rates: Mapping[str, float]) -> StepOutcome:
        """Take an optimizer step with the accumulated gradient, unless a part of it is not finite.

        Args:
            rates: The learning rate of each role; or of a parameter group, ROLE.PART, that has its own.
        """
        for group in self.engine.optimizer.param_groups:
            name = group["role"]
            group["lr"] = rates[name] if name in rates else rates[role_of_group(name)] * group["factor"]
        skipped_before = self._skipped()
        self.engine.step()
        return StepOutcome(norms=dict(self.clip.norms), skipped=self._skipped() > skipped_before)

    def _skipped(self) -> int:
        """Number of steps that were skipped, by the clip at ZeRO stage 0 and by DeepSpeed at the others."""
        return self.clip.skipped + int(self.engine.skipped_steps)

    def microbatches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The indices of the sequences of each microbatch, `tokens_per_microbatch` at most."""
        return self.module.microbatches(lengths, self.tokens_per_microbatch)

    @contextmanager
    def memory_for(self, lengths: Sequence[int]) -> Iterator[None]:
        """Compute a microbatch, of sequences with these lengths, in the block.

        Raises:
            MicrobatchTooLarge: This process runs out of memory.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MicrobatchTooLarge(self.number, sum(lengths), len(lengths), first_line(error)) from error

    def _default_tokens_per_microbatch(self) -> int:
        """What suits the rank with the least free memory."""
        tokens = torch.tensor(self.module.default_microbatch_tokens(), device=self.device)
        return int(self._over_ranks(tokens, dist.ReduceOp.MIN))

    def same_count_on_all_ranks(self, microbatches: list[list[int]]) -> list[list[int]]:
        """The microbatches, followed by fillers of sequence 0 up to the largest number on any rank."""
        if self.count == 1:
            return microbatches
        count = torch.tensor(len(microbatches), device=self.device)
        largest_count = int(self._over_ranks(count, dist.ReduceOp.MAX))
        return microbatches + [[0]] * (largest_count - len(microbatches))

    def _over_ranks(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce a tensor over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, op=operation)
        return tensor

    def read_adapter(self, trunk: Trunk, role: str) -> AdapterWeights:
        """A complete copy of a role's adapter, on the CPU."""
        return self._state.read_adapter(trunk, role)

    def read_module(self, module: nn.Module) -> dict[str, Tensor]:
        """A complete copy of the state of a part of the trained module, on the CPU."""
        return self._state.read_module(module)

    def state(self) -> LearnerState:
        """A copy of everything that steps change, on the CPU; of the optimizer's state, this rank's part."""
        return self._state.state()

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage; see `RankState.restore`."""
        self._state.restore(states, zero)

    def close(self) -> None:
        """Destroy the engine."""
        destroy_engine(self.engine)
        os.environ.pop("LOCAL_RANK", None)
