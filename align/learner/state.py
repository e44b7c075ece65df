"""The trained state of one rank of the learner: read for a checkpoint and restored from one, bit for bit.

A rank's state in a checkpoint:

    policy        the policy's adapter, complete (the same on every rank)
    critic        the critic's adapter, complete; empty where it has none
    critic_head   the critic's head, complete; empty where there is no critic
    optimizer     N.master, N.state.exp_avg, …: this rank's part, in the layout of its ZeRO stage (see `reshard`)

It can be restored with another number of ranks or ZeRO stage: the parts of all ranks are joined and divided again.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align.learner.optimizer import partitions
from align.learner.reshard import Layout, shard, unshard
from align.roles.roles import Roles
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes
from policies.trunk import AdapterWeights, Trunk


@dataclass(frozen=True)
class LearnerState:
    """The state of one rank in a checkpoint, on the CPU.

    Attributes:
        policy: The policy's adapter.
        critic: The critic's adapter; empty where it has none.
        critic_head: The critic's head; empty where there is no critic.
        optimizer: This rank's part of the optimizer's state, under the names of `reshard`.
    """

    policy: AdapterWeights
    critic: AdapterWeights
    critic_head: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class RankState:
    """Everything that updates change on one rank: adapters, critic head, and its part of the optimizer's state."""

    def __init__(
        self, roles: Roles, sizes: Sequence[Sequence[int]], engine: Any, optimizer: torch.optim.Optimizer, zero: int
    ) -> None:
        """Refer to what is trained; the default process group must exist.

        Args:
            roles: The policy and the critic.
            sizes: Number of elements of each complete parameter of each of the optimizer's groups.
            engine: DeepSpeed's engine around the roles.
            optimizer: The optimizer that the engine steps.
            zero: The engine's ZeRO stage.
        """
        self.roles = roles
        self.engine = engine
        self.optimizer = optimizer
        self.layout = Layout(sizes, zero, ranks=dist.get_world_size())

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU."""
        return self._read_adapter(self.roles.trunk, "policy")

    def state(self) -> LearnerState:
        """A copy of everything that updates change, on the CPU."""
        optimizer = {}
        for number, master in enumerate(self._masters()):
            optimizer[f"{number}.master"] = master.detach()
            for name, value in self.optimizer.state.get(master, {}).items():
                optimizer[f"{number}.state.{name}"] = _at_least_one_dimension(torch.as_tensor(value))
        return LearnerState(
            policy=self._read_adapter(self.roles.trunk, "policy"),
            critic=self._read_adapter(self.roles.critic_trunk, "critic"),
            critic_head=self._read_critic_head(),
            optimizer={name: tensor.cpu().contiguous().clone() for name, tensor in optimizer.items()},
        )

    @torch.no_grad()
    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore a saved state, bit for bit where the number of ranks and the ZeRO stage are the same.

        Args:
            states: The state of each rank that saved one, in order.
            zero: The ZeRO stage at which they were saved.

        Raises:
            UserError: The state is of another model or was saved with other settings.
        """
        state = self._in_this_layout(states, zero)
        self._check(state)
        self._write_adapter(self.roles.trunk, "policy", state.policy)
        self._write_adapter(self.roles.critic_trunk, "critic", state.critic)
        self._write_critic_head(state.critic_head)
        self._write_optimizer(state.optimizer)

    def _in_this_layout(self, states: Sequence[LearnerState], zero: int) -> LearnerState:
        """This rank's state, with its part of the optimizer's state in the current layout."""
        rank = dist.get_rank()
        saved_layout = Layout(self.layout.sizes, zero, ranks=len(states))
        if saved_layout == self.layout:
            return states[rank]
        full = unshard([state.optimizer for state in states], saved_layout)
        shapes = [master.shape for master in self._masters()]
        return replace(states[0], optimizer=shard(full, self.layout, rank, shapes))

    def _check(self, state: LearnerState) -> None:
        """Raise UserError unless the optimizer's tensors and the critic's head fit this model."""
        source = "the checkpoint's optimizer"
        masters = self._masters()
        expected = {f"{number}.master": master for number, master in enumerate(masters)}
        saved = {name: tensor for name, tensor in state.optimizer.items() if name.endswith(".master")}
        check_names_and_shapes(saved, expected, source)
        for name, tensor in state.optimizer.items():
            number, _, kind = name.partition(".")
            is_known = kind == "master" or kind.startswith("state.")
            if f"{number}.master" not in expected or not is_known:
                raise UserError(f"{source} is not of this model: it has {name}")
            if tensor.numel() not in (1, masters[int(number)].numel()):
                raise UserError(f"{source} is not of this model: {name} is {list(tensor.shape)}")
        if self.roles.critic is not None:
            check_names_and_shapes(state.critic_head, self._read_critic_head(), "the checkpoint's critic head")

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

    def _read_adapter(self, trunk: Trunk | None, role: str) -> AdapterWeights:
        if trunk is None:
            return {}
        with self._gathered(list(trunk.adapter(role).values())):
            return {name: tensor.cpu() for name, tensor in trunk.read_adapter(role).items()}

    def _write_adapter(self, trunk: Trunk | None, role: str, weights: AdapterWeights) -> None:
        if trunk is not None:
            with self._gathered(list(trunk.adapter(role).values()), write=True):
                trunk.write_adapter(role, weights)

    def _read_critic_head(self) -> dict[str, Tensor]:
        if self.roles.critic is None:
            return {}
        head = self.roles.critic.head
        with self._gathered(list(head.parameters())):
            return {name: tensor.cpu().clone() for name, tensor in head.state_dict().items()}

    def _write_critic_head(self, weights: Mapping[str, Tensor]) -> None:
        if self.roles.critic is not None:
            head = self.roles.critic.head
            with self._gathered(list(head.parameters()), write=True):
                head.load_state_dict(dict(weights))


def _at_least_one_dimension(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() else tensor.reshape(1)
