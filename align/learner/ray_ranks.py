"""The learner's ranks as Ray actors."""

from collections.abc import Collection, Sequence
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from align.algorithms.episodes import Episode
from align.config.schema import LearnerSettings, PpoSettings
from align.learner.group import Mixed, Orders, collective_backend
from align.learner.learner import Learner, StepCoefficients
from align.learner.state import LearnerState
from align.roles.build import Blueprint, build_roles
from align.roles.scoring import ALL_ROLES
from align.runtime.failures import RankLost
from policies.device import ComputeSettings
from policies.errors import first_line
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory

GRACE = 5.0
"""Seconds that a rank is given to say that it lives."""


class RayLearners:
    """`learner.ranks` Ray actors that form one process group."""

    def __init__(
        self,
        blueprint: Blueprint,
        ppo: PpoSettings,
        learner: LearnerSettings,
        temperature: float,
        computing: ComputeSettings,
    ) -> None:
        self.ranks = learner.ranks
        options = {"num_cpus": 1, "num_gpus": learner.gpus, "max_restarts": 0}
        self.actors = [ray.remote(_Rank).options(**options).remote(rank, computing) for rank in range(self.ranks)]
        store = self._get([self.actors[0].open_store.remote(self.ranks)])[0]
        plan = ray.put(blueprint)
        self._all("join", store, self.ranks, plan, ppo, learner, temperature)

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        by_length = sorted(range(len(trajectories)), key=lambda i: trajectories[i].total_length)
        # Every rank must take part, the one without a row of its own by scoring one that another scores too.
        shares = [by_length[rank :: self.ranks] or by_length[:1] for rank in range(self.ranks)]
        calls = [
            actor.score.remote([trajectories[i] for i in share], requested_roles)
            for actor, share in zip(self.actors, shares, strict=True)
        ]
        scored = {
            i: output
            for share, outputs in zip(shares, self._get(calls), strict=True)
            for i, output in zip(share, outputs, strict=True)
        }
        return [scored[i] for i in range(len(trajectories))]

    def update(
        self, episodes: Sequence[Episode], orders: Orders, coefficients: StepCoefficients, demonstrations: Mixed = ()
    ) -> dict[str, float]:
        return self._all("update", ray.put(list(episodes)), orders, coefficients, demonstrations)[0]

    def policy_weights(self) -> AdapterWeights:
        return self._all("policy_weights")[0]

    def state(self) -> list[LearnerState]:
        return self._all("state")

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        self._all("restore", ray.put(list(states)), zero)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return self._get([getattr(actor, method).remote(*arguments) for actor in self.actors])

    def _get(self, calls: list[Any]) -> list[Any]:
        """What the calls give. Raises RankLost where a rank has died, even if another one said so first."""
        try:
            return ray.get(calls)
        except RayError as error:
            for rank, actor in enumerate(self.actors):
                try:
                    ray.get(actor.ready.remote(), timeout=GRACE)
                except RayActorError as death:
                    raise RankLost(f"rank {rank} of the learner has died: {first_line(death)}") from error
                except GetTimeoutError:
                    continue  # it hangs in talk with the dead one
            raise


class _Rank:
    """The actor of one rank."""

    def __init__(self, rank: int, computing: ComputeSettings) -> None:
        computing.apply()
        self.rank = rank

    def ready(self) -> None:
        """Answers, once what was asked before is done, where the process lives."""

    def open_store(self, world: int) -> tuple[str, int]:
        """Open the store at which the ranks meet, on a port that the system picks. Returns where it is."""
        host = ray.util.get_node_ip_address()
        self.store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def join(
        self,
        store: tuple[str, int],
        world: int,
        blueprint: Blueprint,
        ppo: PpoSettings,
        learner: LearnerSettings,
        temperature: float,
    ) -> None:
        """Build the roles and meet the other ranks."""
        own = self.store if self.rank == 0 else dist.TCPStore(*store, world, is_master=False)
        dist.init_process_group(collective_backend(), store=own, rank=self.rank, world_size=world)
        roles = build_roles(blueprint, ppo.active_critic)
        self.learner = Learner(roles, ppo, learner, temperature, blueprint.model.gradient_checkpointing)

    def score(self, trajectories: list[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return self.learner.score(trajectories, requested_roles)

    def update(
        self, episodes: list[Episode], orders: Orders, coefficients: StepCoefficients, demonstrations: Mixed
    ) -> dict[str, float]:
        return self.learner.update(episodes, orders, coefficients, demonstrations)

    def policy_weights(self) -> AdapterWeights:
        return self.learner.policy_weights()

    def state(self) -> LearnerState:
        return self.learner.state()

    def restore(self, states: list[LearnerState], zero: int) -> None:
        self.learner.restore(states, zero)
