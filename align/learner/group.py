"""All ranks of the learner behind one interface, and its simplest form: one rank in this process."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore  # torch.distributed has it, but not for type checkers

from align.algorithms.episodes import Episode
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.learner.learner import DemonstrationBatches, Learner, MinibatchOrders, StepCoefficients
from align.learner.state import LearnerState
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory


class Learners(Protocol):
    """All ranks of the learner."""

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        """Compute the outputs of the requested roles, one record per trajectory; see `Learner.score`."""
        ...

    def update(
        self,
        episodes: Sequence[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step and return statistics; see `Learner.update`."""
        ...

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU."""
        ...

    def state(self) -> list[LearnerState]:
        """The state of each rank, for a checkpoint."""
        ...

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage.

        Bit for bit where the number of ranks and the stage are the same as now.
        """
        ...

    def close(self) -> None:
        """Free the resources of all ranks."""
        ...


class LocalLearners:
    """One rank in this process."""

    def __init__(
        self, roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
    ) -> None:
        """Form a process group of one process and build its `Learner`."""
        dist.init_process_group(collective_backend(), store=HashStore(), rank=0, world_size=1)
        self.learner = Learner(roles, ppo, learner, temperature, gradient_checkpointing)

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        return self.learner.score(trajectories, requested_roles)

    def update(
        self,
        episodes: Sequence[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        return self.learner.update(episodes, orders, coefficients, demonstrations)

    def policy_weights(self) -> AdapterWeights:
        return self.learner.policy_weights()

    def state(self) -> list[LearnerState]:
        return [self.learner.state()]

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        self.learner.restore(states, zero)

    def close(self) -> None:
        import deepspeed

        self.learner.close()
        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with a group that no longer exists


def collective_backend() -> str:
    """The backend of the collectives: nccl between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"
