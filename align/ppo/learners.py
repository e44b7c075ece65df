"""All ranks of PPO's learner."""

from collections.abc import Collection, Sequence
from functools import partial

from align.algorithms.episodes import Episode
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.learner.group import LocalRank, Ranks, deal_by_length
from align.learner.state import LearnerState
from align.ppo.episode_shards import MinibatchOrders, make_shards
from align.ppo.learner import DemonstrationBatches, PpoLearner, StepCoefficients
from align.roles.build import Blueprint, build_roles
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES
from policies.device import ActorOptions
from policies.trunk import AdapterWeights
from rollouts.packed_records import TokenBatch
from rollouts.trajectory import RoleOutputs, Trajectory


class PpoLearners:
    """All ranks of PPO's learner, wherever they are."""

    def __init__(self, ranks: Ranks[PpoLearner]) -> None:
        self.ranks = ranks

    def score(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str] = ALL_ROLES
    ) -> list[RoleOutputs]:
        """Compute the outputs of the requested roles, one record per trajectory; see `PpoLearner.score`."""
        dealt = deal_by_length([trajectory.total_length for trajectory in trajectories], self.ranks.count)
        # Every rank must take part: one without a trajectory scores the shortest, which another rank scores too.
        shares = [share or dealt[0][:1] for share in dealt]
        arguments = []
        for share in shares:
            arguments.append((TokenBatch(trajectories[i] for i in share), requested_roles))
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
        shards = make_shards(episodes, orders, self.ranks.count, self.ranks.share)
        return self.ranks.call(PpoLearner.update, shards, orders, coefficients, demonstrations)[0]

    def tokens_per_microbatch(self) -> int:
        """The most tokens of a microbatch."""
        return self.ranks.call(PpoLearner.tokens_per_microbatch)[0]

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU."""
        return self.ranks.call(PpoLearner.policy_weights)[0]

    def state(self) -> Sequence[LearnerState]:
        """The state of each rank, for a checkpoint; see `Ranks.call_and_keep`."""
        return self.ranks.call_and_keep(PpoLearner.state)

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage.

        Bit for bit where the number of ranks and the stage are the same as now.
        """
        self.ranks.call(PpoLearner.restore, list(states), zero)

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
