"""All ranks of PPO's learner."""

from collections.abc import Collection, Sequence
from functools import partial

from align.algorithms.episodes import Episode
from align.algorithms.packed_episodes import EpisodeBatch
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.learner.group import LocalRank, Ranks
from align.learner.state import LearnerState
from align.ppo.learner import DemonstrationBatches, MinibatchOrders, PpoLearner, StepCoefficients
from align.roles.build import Blueprint, build_roles
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES
from policies.device import ActorOptions
from policies.trunk import AdapterWeights
from rollouts.trajectory import RoleOutputs, Trajectory


class PpoLearners:
    """All ranks of PPO's learner, wherever they are."""

    def __init__(self, ranks: Ranks[PpoLearner]) -> None:
        self.ranks = ranks

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        """Compute the outputs of the requested roles, one record per trajectory; see `PpoLearner.score`."""
        by_length = sorted(range(len(trajectories)), key=lambda i: trajectories[i].total_length)
        shares = []
        arguments = []
        for rank in range(self.ranks.count):
            # Every rank must take part: one without a trajectory scores the shortest, which another rank scores too.
            share = by_length[rank :: self.ranks.count] or by_length[:1]
            shares.append(share)
            arguments.append(([trajectories[i] for i in share], requested_roles))
        scored: dict[int, RoleOutputs] = {}
        for share, outputs in zip(shares, self.ranks.scatter(PpoLearner.score, arguments), strict=True):
            scored |= zip(share, outputs, strict=True)
        return [scored[i] for i in range(len(trajectories))]

    def update(
        self,
        episodes: Sequence[Episode],
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step and return statistics, the same of every rank; see `PpoLearner.update`."""
        batch = EpisodeBatch(episodes)
        return self.ranks.call(PpoLearner.update, batch, orders, coefficients, demonstrations)[0]

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU."""
        return self.ranks.call(PpoLearner.policy_weights)[0]

    def state(self) -> list[LearnerState]:
        """The state of each rank, for a checkpoint."""
        return self.ranks.call(PpoLearner.state)

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage.

        Bit for bit where the number of ranks and the stage are the same as now.
        """
        self.ranks.call(PpoLearner.restore, states, zero)

    def close(self) -> None:
        """Free the resources of all ranks."""
        self.ranks.close()


def local_learners(
    roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
) -> PpoLearners:
    """One rank in this process; see `PpoLearner`."""
    build = partial(
        PpoLearner,
        roles=roles,
        ppo=ppo,
        learner=learner,
        temperature=temperature,
        gradient_checkpointing=gradient_checkpointing,
    )
    return PpoLearners(LocalRank(build))


def ray_learners(
    blueprint: Blueprint,
    ppo: PpoSettings,
    learner: LearnerSettings,
    temperature: float,
    actors: Sequence[ActorOptions],
) -> PpoLearners:
    """Ray actors, one per rank.

    Args:
        blueprint: The blueprint from which each rank builds the roles.
        ppo: The settings of PPO.
        learner: The settings of the learner.
        temperature: Sampling temperature, by which logits are divided.
        actors: How each rank's actor is started, and how it computes.
    """
    from align.learner.ray_ranks import RayRanks  # Ray is slow to import

    build = partial(build_ppo_learner, blueprint, ppo, learner, temperature)
    return PpoLearners(RayRanks(build, actors))


def build_ppo_learner(
    blueprint: Blueprint, ppo: PpoSettings, learner: LearnerSettings, temperature: float
) -> PpoLearner:
    """Build the roles and a rank around them."""
    roles = build_roles(blueprint, ppo.active_critic)
    return PpoLearner(roles, ppo, learner, temperature, blueprint.model.gradient_checkpointing)
