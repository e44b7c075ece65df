"""All ranks of the learner as one, and the simplest such thing: one rank in this process."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from align.algorithms.episodes import Episode
from align.config.schema import LearnerSettings, PpoSettings
from align.data.datasets import TokenizedDemonstration
from align.learner.learner import Learner, StepCoefficients
from align.learner.state import LearnerState
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory

Orders = Sequence[Sequence[Sequence[int]]]
"""For each epoch, for each minibatch, the episodes in it."""

Mixed = Sequence[Sequence[TokenizedDemonstration]]
"""For each optimizer step, the demonstrations that are mixed into it; none at all without ptx."""


class Learners(Protocol):
    """All ranks of the learner as one."""

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]: ...

    def update(
        self, episodes: Sequence[Episode], orders: Orders, coefficients: StepCoefficients, demonstrations: Mixed = ()
    ) -> dict[str, float]: ...

    def policy_weights(self) -> AdapterWeights: ...

    def state(self) -> list[LearnerState]:
        """One state a rank."""
        ...

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Take up the states that so many ranks have saved at this ZeRO stage; bit for bit where these are as many."""
        ...

    def close(self) -> None: ...


class LocalLearners:
    """One rank in this process."""

    def __init__(
        self, roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
    ) -> None:
        dist.init_process_group(collective_backend(), store=dist.HashStore(), rank=0, world_size=1)
        self.learner = Learner(roles, ppo, learner, temperature, gradient_checkpointing)
        self.score = self.learner.score
        self.update = self.learner.update
        self.policy_weights = self.learner.policy_weights
        self.restore = self.learner.restore

    def state(self) -> list[LearnerState]:
        return [self.learner.state()]

    def close(self) -> None:
        import deepspeed

        self.learner.close()
        deepspeed.comm.destroy_process_group()  # torch's own would leave DeepSpeed with a group that is gone


def collective_backend() -> str:
    """What processes talk by: nccl between GPUs, gloo between CPUs."""
    return "nccl" if torch.cuda.is_available() else "gloo"
