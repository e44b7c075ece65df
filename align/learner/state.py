"""The trained state of one rank: read for a checkpoint and restored from one, bit for bit.

A rank's state in a checkpoint:

    weights       the trained adapters and heads, complete; only of the first rank
    optimizer     N.master, N.state.exp_avg, …: this rank's part, in the layout of its ZeRO stage (see `reshard`)

It can be restored with another number of ranks or ZeRO stage: the parts of all ranks are joined and divided again.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.learner.partitions import partitions
from align.learner.reshard import Layout, shard, unshard
from align.roles.trained import TrainedModule
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes
from policies.trunk import AdapterWeights, Trunk


@dataclass(frozen=True)
class TrainedWeights:
    """Complete copies of what is trained, on the CPU.

    Attributes:
        adapters: The adapters by role.
        heads: The state of the other trained modules by name, ROLE or ROLE.PART.
    """

    adapters: dict[str, AdapterWeights] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LearnerState:
    """The state of one rank in a checkpoint, on the CPU.

    Attributes:
        weights: What is trained; empty on ranks other than the first.
        optimizer: This rank's part of the optimizer's state, under the names of `reshard`.
    """

    weights: TrainedWeights
    optimizer: dict[str, Tensor]


class RankState:
    """Everything that steps change on one rank: adapters, heads, and its part of the optimizer's state."""

    def __init__(
        self,
        module: TrainedModule,
        sizes: Sequence[Sequence[int]],
        engine: Any,
        optimizer: torch.optim.Optimizer,
        zero: int,
    ) -> None:
        """Refer to what is trained; the default process group must exist.

        Args:
            module: What is trained.
            sizes: Number of elements of each complete parameter of each of the optimizer's groups.
            engine: DeepSpeed's engine around the module.
            optimizer: The optimizer that the engine steps.
            zero: The engine's ZeRO stage.
        """
        self.module = module
        self.engine = engine
        self.optimizer = optimizer
        self.layout = Layout(sizes, zero, ranks=dist.get_world_size())

    def read_adapter(self, trunk: Trunk, role: str) -> AdapterWeights:
        """A complete copy of a role's adapter, on the CPU."""
        with self._gathered(list(trunk.adapter(role).values())):
            return {name: tensor.cpu() for name, tensor in trunk.read_adapter(role).items()}

    def weights(self) -> TrainedWeights:
        """A complete copy of what is trained, on the CPU; empty on ranks other than the first, which take part."""
        weights = TrainedWeights()
        for role, trunk in self.module.trained_adapters.items():
            weights.adapters[role] = self.read_adapter(trunk, role)
        for name, head in self.module.trained_heads.items():
            weights.heads[name] = self.read_module(head)
        return weights if dist.get_rank() == 0 else TrainedWeights()

    def read_module(self, module: nn.Module) -> dict[str, Tensor]:
        """A complete copy of a module's state, on the CPU."""
        with self._gathered(list(module.parameters())):
            return {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}

    def state(self) -> LearnerState:
        """A copy of everything that steps change, on the CPU."""
        optimizer = {}
        for number, master in enumerate(self._masters()):
            optimizer[f"{number}.master"] = master.detach()
            for name, value in self.optimizer.state.get(master, {}).items():
                optimizer[f"{number}.state.{name}"] = _at_least_one_dimension(torch.as_tensor(value))
        part = {name: tensor.cpu().contiguous().clone() for name, tensor in optimizer.items()}
        return LearnerState(self.weights(), part)

    @torch.no_grad()
    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore a saved state, bit for bit where the number of ranks and the ZeRO stage are the same.

        Args:
            states: The state of each rank that saved one, in order.
            zero: The ZeRO stage at which they were saved.

        Raises:
            UserError: The state is of another model or was saved with other settings.
        """
        weights = states[0].weights
        optimizer = self._in_this_layout([state.optimizer for state in states], zero)
        self._check(weights, optimizer)
        for role, trunk in self.module.trained_adapters.items():
            with self._gathered(list(trunk.adapter(role).values()), write=True):
                trunk.write_adapter(role, weights.adapters[role])
        for name, head in self.module.trained_heads.items():
            with self._gathered(list(head.parameters()), write=True):
                head.load_state_dict(weights.heads[name])
        self._write_optimizer(optimizer)

    def _in_this_layout(self, parts: Sequence[dict[str, Tensor]], zero: int) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state in the current layout."""
        rank = dist.get_rank()
        saved_layout = Layout(self.layout.sizes, zero, ranks=len(parts))
        if saved_layout == self.layout:
            return parts[rank]
        shapes = [master.shape for master in self._masters()]
        return shard(unshard(parts, saved_layout), self.layout, rank, shapes)

    def _check(self, weights: TrainedWeights, optimizer: Mapping[str, Tensor]) -> None:
        """Raise UserError unless the optimizer's tensors and the heads fit this model."""
        source = "the checkpoint's optimizer"
        masters = self._masters()
        expected = {f"{number}.master": master for number, master in enumerate(masters)}
        saved = {name: tensor for name, tensor in optimizer.items() if name.endswith(".master")}
        check_names_and_shapes(saved, expected, source)
        for name, tensor in optimizer.items():
            number, _, kind = name.partition(".")
            is_known = kind == "master" or kind.startswith("state.")
            if f"{number}.master" not in expected or not is_known:
                raise UserError(f"{source} is not of this model: it has {name}")
            if tensor.numel() not in (1, masters[int(number)].numel()):
                raise UserError(f"{source} is not of this model: {name} is {list(tensor.shape)}")
        for name, head in self.module.trained_heads.items():
            check_names_and_shapes(weights.heads[name], self.read_module(head), f"the checkpoint's {name} head")

    def _masters(self) -> list[Tensor]:
        """What the optimizer steps: complete parameters at ZeRO 0, this rank's flat float32 partitions otherwise."""
        if self.layout.zero > 0:
            return partitions(self.engine.optimizer)
        masters: list[Tensor] = []
        for group in self.optimizer.param_groups:
            masters += group["params"]
        return masters

    def _write_optimizer(self, saved: Mapping[str, Tensor]) -> None:
        for number, master in enumerate(self._masters()):
            master.copy_(saved[f"{number}.master"])
            self.optimizer.state.pop(master, None)
            state = {}
            prefix = f"{number}.state."
            for name, tensor in saved.items():
                if name.startswith(prefix):
                    state[name.removeprefix(prefix)] = tensor.to(master.device, copy=True)
            if "step" in state:
                # A step count is saved as `[1]`; the fused optimizer needs a scalar on the device.
                state["step"] = state["step"].squeeze()
            if state:
                self.optimizer.state[master] = state

    def _gathered(self, parameters: list[nn.Parameter], write: bool = False) -> AbstractContextManager[Any]:
        """A context in which the parameters are complete, at ZeRO 3 too; changes are kept with `write`."""
        if self.layout.zero < 3 or not parameters:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        context: AbstractContextManager[Any] = GatheredParameters(parameters, modifier_rank=0 if write else None)
        return context


def _at_least_one_dimension(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() else tensor.reshape(1)
