"""The ranks of the learner as Ray actors.

    controller                            actors
    RayLearners.score(trajectories)   →   rank r scores every R-th trajectory by length
    RayLearners.update(episodes)      →   every rank gets all episodes and trains on its share of each minibatch
    RayLearners.state()               →   each rank returns its own part

The ranks form one process group and reduce gradients between themselves.
"""

from collections.abc import Collection, Sequence
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it, but not for type checkers

from align.algorithms.episodes import Episode
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.learner.group import collective_backend
from align.learner.learner import DemonstrationBatches, Learner, MinibatchOrders, StepCoefficients
from align.learner.state import LearnerState
from align.roles.build import Blueprint, build_roles
from align.roles.scoring import ALL_ROLES
from align.runtime.failures import RankLost
from policies.device import ComputeSettings
from policies.errors import first_line
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory

GRACE = 5.0
"""Seconds in which a rank must respond to count as alive."""


class RayLearners:
    """`learner.ranks` Ray actors that form one process group."""

    def __init__(
        self,
        blueprint: Blueprint,
        ppo: PpoSettings,
        learner: LearnerSettings,
        temperature: float,
        compute: ComputeSettings,
    ) -> None:
        """Start the actors, build the roles in each of them, and connect them.

        Args:
            blueprint: The blueprint from which each rank builds the roles.
            ppo: The settings of PPO.
            learner: The settings of the learner.
            temperature: Sampling temperature, by which logits are divided.
            compute: Threads and determinism of each rank.
        """
        self.ranks = learner.ranks
        options = {"num_cpus": 1, "num_gpus": learner.gpus, "max_restarts": 0}
        self.actors = [ray.remote(_Rank).options(**options).remote(rank, compute) for rank in range(self.ranks)]
        (address,) = self._results([self.actors[0].open_store.remote(self.ranks)])
        self._call_all("join", address, self.ranks)
        self._call_all("build", ray.put(blueprint), ppo, learner, temperature)

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        by_length = sorted(range(len(trajectories)), key=lambda i: trajectories[i].total_length)
        shares = []
        calls = []
        for rank, actor in enumerate(self.actors):
            # Every rank must take part: one without a trajectory scores the shortest, which another rank scores too.
            share = by_length[rank :: self.ranks] or by_length[:1]
            shares.append(share)
            calls.append(actor.score.remote([trajectories[i] for i in share], requested_roles))
        scored: dict[int, RoleOutputs] = {}
        for share, outputs in zip(shares, self._results(calls), strict=True):
            scored |= zip(share, outputs, strict=True)
        return [scored[i] for i in range(len(trajectories))]

    def update(
        self,
        episodes: Sequence[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        statistics: list[dict[str, float]] = self._call_all(
            "update", ray.put(list(episodes)), orders, coefficients, demonstrations
        )
        return statistics[0]  # they are the same on every rank

    def policy_weights(self) -> AdapterWeights:
        weights: list[AdapterWeights] = self._call_all("policy_weights")
        return weights[0]  # they are the same on every rank

    def state(self) -> list[LearnerState]:
        return self._call_all("state")

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        self._call_all("restore", ray.put(list(states)), zero)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of all ranks with the same arguments; the results by rank."""
        return self._results([getattr(actor, method).remote(*arguments) for actor in self.actors])

    def _results(self, calls: list[Any]) -> list[Any]:
        """Wait for the results of calls.

        Raises:
            RankLost: A rank has died, even if another rank failed first because of it.
        """
        try:
            results: list[Any] = ray.get(calls)
        except RayError as error:
            self._raise_if_a_rank_died(error)
            raise
        return results

    def _raise_if_a_rank_died(self, error: RayError) -> None:
        for rank, actor in enumerate(self.actors):
            try:
                ray.get(actor.ready.remote(), timeout=GRACE)
            except RayActorError as death:
                raise RankLost(f"rank {rank} of the learner has died: {first_line(death)}") from error
            except GetTimeoutError:
                continue  # it is alive, and blocked in a collective with the dead rank


class _Rank:
    """The actor of one rank."""

    def __init__(self, rank: int, compute: ComputeSettings) -> None:
        compute.apply()
        self.rank = rank

    def ready(self) -> None:
        """Return once earlier calls are done, if the process is alive."""

    def open_store(self, ranks: int) -> tuple[str, int]:
        """Open the store through which the ranks connect, on a free port. Returns its host and port."""
        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def join(self, address: tuple[str, int], ranks: int) -> None:
        """Connect to the other ranks. Rank 0 has opened the store itself."""
        host, port = address
        store = self.store if self.rank == 0 else TCPStore(host, port, ranks, is_master=False)
        dist.init_process_group(collective_backend(), store=store, rank=self.rank, world_size=ranks)

    def build(self, blueprint: Blueprint, ppo: PpoSettings, learner: LearnerSettings, temperature: float) -> None:
        """Build the roles and the learner."""
        roles = build_roles(blueprint, ppo.active_critic)
        self.learner = Learner(roles, ppo, learner, temperature, blueprint.model.gradient_checkpointing)

    def score(self, trajectories: list[Trajectory], requested_roles: Collection[str]) -> list[RoleOutputs]:
        return self.learner.score(trajectories, requested_roles)

    def update(
        self,
        episodes: list[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches,
    ) -> dict[str, float]:
        return self.learner.update(episodes, orders, coefficients, demonstrations)

    def policy_weights(self) -> AdapterWeights:
        return self.learner.policy_weights()

    def state(self) -> LearnerState:
        return self.learner.state()

    def restore(self, states: list[LearnerState], zero: int) -> None:
        self.learner.restore(states, zero)
