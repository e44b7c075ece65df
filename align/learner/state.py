"""What a rank of the learner has learned: read from it, saved, and taken up again, bit for bit or cut anew."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align.learner.reshard import shard, unshard
from align.roles.roles import Roles
from policies.errors import UserError
from policies.files.safe_reading import check_names_and_shapes
from policies.trunk import AdapterWeights, Trunk


@dataclass(frozen=True)
class LearnerState:
    """What a checkpoint holds of one rank. The optimizer's tensors are this rank's partitions at ZeRO 1 to 3.

    critic, critic_head: empty where the critic has no adapter, or where there is none.
    """

    policy: AdapterWeights
    critic: AdapterWeights
    critic_head: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class RankState:
    """All that the updates of a rank change: adapters, the critic's head, and its part of the optimizer."""

    def __init__(
        self, roles: Roles, sizes: Sequence[Sequence[int]], engine: Any, optimizer: torch.optim.Optimizer, zero: int
    ) -> None:
        """engine: DeepSpeed's around the roles at this ZeRO stage; optimizer: what it steps.

        sizes: how many numbers each parameter of each of its groups has when it is whole.
        """
        self.roles, self.sizes, self.engine, self.optimizer, self.zero = roles, sizes, engine, optimizer, zero

    def policy_weights(self) -> AdapterWeights:
        """A copy of the policy's adapter, whole, on the CPU."""
        return self._read(self.roles.trunk, "policy")

    def state(self) -> LearnerState:
        """All that the update has changed, on the CPU: whole adapters and head, this rank's part of the optimizer."""
        optimizer = {}
        for index, master in enumerate(self._masters()):
            optimizer[f"{index}.master"] = master.detach()
            for name, value in self.optimizer.state.get(master, {}).items():
                optimizer[f"{index}.state.{name}"] = torch.atleast_1d(torch.as_tensor(value))
        return LearnerState(
            policy=self._read(self.roles.trunk, "policy"),
            critic=self._read(self.roles.critic_trunk, "critic"),
            critic_head=self._read_head(),
            optimizer={name: tensor.cpu().contiguous().clone() for name, tensor in optimizer.items()},
        )

    @torch.no_grad()
    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Take up what so many ranks have saved at this ZeRO stage: bit for bit where it is as many and the same.

        Raises UserError where it is of another model, or was saved otherwise.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if (len(states), zero) == (ranks, self.zero):
            state = states[rank]
        else:
            whole = unshard([state.optimizer for state in states], self.sizes, zero)
            shapes = [master.shape for master in self._masters()]
            state = replace(states[0], optimizer=shard(whole, self.sizes, self.zero, rank, ranks, shapes))
        self._check(state)
        self._write(self.roles.trunk, "policy", state.policy)
        self._write(self.roles.critic_trunk, "critic", state.critic)
        if self.roles.critic is not None:
            with self._gathered(list(self.roles.critic.head.parameters()), write=True):
                self.roles.critic.head.load_state_dict(state.critic_head)
        for index, master in enumerate(self._masters()):
            master.copy_(state.optimizer[f"{index}.master"])
            mark = f"{index}.state."
            saved = {n.removeprefix(mark): t for n, t in state.optimizer.items() if n.startswith(mark)}
            self.optimizer.state.pop(master, None)
            if saved:
                own = {name: tensor.to(master.device, copy=True) for name, tensor in saved.items()}
                # A count is saved as one number in a row; the fused optimizer wants it plain, and on the device.
                self.optimizer.state[master] = own | ({"step": own["step"].squeeze()} if "step" in own else {})

    def _check(self, state: LearnerState) -> None:
        masters, what = self._masters(), "the checkpoint's optimizer"
        expected = {f"{index}.master": master for index, master in enumerate(masters)}
        check_names_and_shapes(
            {name: t for name, t in state.optimizer.items() if name.endswith(".master")}, expected, what
        )
        for name, tensor in state.optimizer.items():
            number, kind, _ = name.split(".", 2) if name.count(".") > 1 else (name.partition(".")[0], "master", "")
            if f"{number}.master" not in expected or kind not in ("master", "state"):
                raise UserError(f"{what} is not of this model: it has {name}")
            if tensor.numel() not in (1, masters[int(number)].numel()):
                raise UserError(f"{what} is not of this model: {name} is {list(tensor.shape)}")
        if self.roles.critic is not None:
            check_names_and_shapes(state.critic_head, self._read_head(), "the checkpoint's critic head")

    def _masters(self) -> list[Tensor]:
        """What the optimizer steps: whole parameters at ZeRO 0, this rank's flat float32 partitions otherwise."""
        zero = self.engine.optimizer
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
            if hasattr(zero, name):
                return list(getattr(zero, name))
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _gathered(self, parameters: list[Any], write: bool = False) -> AbstractContextManager[Any]:
        if self.zero < 3 or not parameters:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameters, modifier_rank=0 if write else None)

    def _read(self, trunk: Trunk | None, role: str) -> AdapterWeights:
        if trunk is None:
            return {}
        with self._gathered(list(trunk.adapter(role).values())):
            return {name: tensor.cpu() for name, tensor in trunk.read_adapter(role).items()}

    def _read_head(self) -> AdapterWeights:
        if self.roles.critic is None:
            return {}
        head = self.roles.critic.head
        with self._gathered(list(head.parameters())):
            return {name: tensor.cpu().clone() for name, tensor in head.state_dict().items()}

    def _write(self, trunk: Trunk | None, role: str, weights: AdapterWeights) -> None:
        if trunk is not None:
            with self._gathered(list(trunk.adapter(role).values()), write=True):
                trunk.write_adapter(role, weights)
