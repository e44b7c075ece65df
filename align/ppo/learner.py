"""PPO's learner: the policy and the critic on one base model."""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest

import torch
from torch import Tensor

from align.algorithms.episodes import Episode
from align.algorithms.losses import load_policy_loss
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.data.examples import TokenizedDemonstration
from align.learner.likelihood import collate_demonstrations, likelihood_objective
from align.learner.rank import Rank, StepOutcome
from align.learner.state import LearnerState
from align.ppo.episode_shards import EpisodeShards, MinibatchOrders, StoredEpisode
from align.ppo.objective import MAXIMA, STATISTICS, collate_episodes, ppo_objectives, summed
from align.roles.roles import Roles
from align.roles.scoring import ALL_ROLES, score_microbatch, score_microbatches
from policies.trunk import AdapterWeights
from rollouts.packed_records import OutputBatch
from rollouts.trajectory import RoleOutputs, ScoredTokens

DemonstrationBatches = Sequence[Sequence[TokenizedDemonstration]]
"""For each optimizer step, the demonstrations that are mixed into it; empty without ptx."""

TRAINED_ROLES = ("policy", "critic")
"""The roles that an update trains, each with its own learning rate and gradient norm."""


@dataclass(frozen=True)
class StepCoefficients:
    """The coefficients of one PPO step.

    Attributes:
        policy_lr: Learning rate of the policy.
        critic_lr: Learning rate of the critic.
        kl_in_loss: Weight of the KL in the loss; 0 where the KL is in the reward.
    """

    policy_lr: float
    critic_lr: float
    kl_in_loss: float


@dataclass(frozen=True)
class MinibatchResult:
    """The measurements of one optimizer step.

    Attributes:
        sums: `[9]` float64, on the CPU: the `STATISTICS`, summed over the tokens of all ranks.
        maxima: `[1]` float64, on the CPU: the `MAXIMA` over the tokens of all ranks.
        weight: Divisor that turns the sums into means.
        ptx_loss: Loss of the demonstrations, in nats per token; 0 without any.
        seconds_at_peak: Seconds that the episodes take at the peak of the GPUs; 0 where it is not known.
        outcome: What happened in the step.
    """

    sums: Tensor
    maxima: Tensor
    weight: float
    ptx_loss: float
    seconds_at_peak: float
    outcome: StepOutcome

    @property
    def approximate_kl(self) -> float:
        """KL of the old policy to the new one, in nats per token."""
        return float(self.sums[STATISTICS.index("approximate_kl")]) / self.weight


class PpoLearner:
    """One rank of PPO's learner: scores trajectories and updates the policy and the critic.

    All ranks make the same calls in the same order. `score` takes this rank's trajectories, `update` all episodes.
    """

    def __init__(
        self, roles: Roles, ppo: PpoSettings, learner: LearnerSettings, temperature: float, gradient_checkpointing: bool
    ) -> None:
        """Build the rank around the roles. The default process group must exist.

        Args:
            roles: The modules that are trained and that score.
            ppo: The settings of PPO.
            learner: The settings of the learner.
            temperature: Sampling temperature, by which logits are divided.
            gradient_checkpointing: Whether the backward pass recomputes activations.
        """
        self.roles = roles
        self.ppo = ppo
        self.temperature = temperature
        self.policy_loss = load_policy_loss(ppo.policy_loss)
        self.rank = Rank(roles, learner, learner.zero, gradient_checkpointing)
        self.utilization = None if ppo.ptx_coefficient else self.rank.utilization()

    @torch.no_grad()
    def score(self, trajectories: Sequence[ScoredTokens], requested_roles: Collection[str] = ALL_ROLES) -> OutputBatch:
        """Compute the outputs of the requested roles.

        Args:
            trajectories: This rank's trajectories, at least one.
            requested_roles: Some of `ALL_ROLES` and `GREEDY`, see `align.roles.scoring`.

        Returns:
            One record per trajectory, in the same order. The score is NaN without a reward head.
        """
        lengths = [trajectory.total_length for trajectory in trajectories]
        microbatches = self.rank.same_count_on_all_ranks(self.rank.microbatches(lengths))
        score = partial(self._score_microbatch, requested_roles)
        return OutputBatch(score_microbatches(score, trajectories, microbatches))

    def update(
        self,
        episodes: Sequence[Episode] | EpisodeShards,
        orders: MinibatchOrders,
        coefficients: StepCoefficients,
        demonstrations: DemonstrationBatches = (),
    ) -> dict[str, float]:
        """Train on all episodes of a step.

        It ends early, after an optimizer step, once the approximate KL per token exceeds `ppo.target_kl`.

        Args:
            episodes: All episodes of the step; of shards, those are fetched that this rank trains on.
            orders: For each epoch, for each minibatch, the indices of its episodes.
            coefficients: Learning rates and the weight of the KL in the loss.
            demonstrations: The demonstrations that are mixed into each optimizer step; empty without ptx.

        Returns:
            Means (`STATISTICS`) and maxima (`MAXIMA`) over the tokens that were trained on, `ptx_loss`,
            `seconds_at_peak`, `optimizer_steps`, `skipped_steps`, and `policy_gradient_norm` and
            `critic_gradient_norm`: the same on every rank.
        """
        results: list[MinibatchResult] = []
        minibatches = chain.from_iterable(orders)
        for indices, mixed_in in zip_longest(minibatches, demonstrations, fillvalue=()):
            minibatch: list[Episode | StoredEpisode] = [episodes[i] for i in indices]
            result = self._train_minibatch(minibatch, mixed_in, coefficients)
            results.append(result)
            if self.ppo.target_kl is not None and result.approximate_kl > self.ppo.target_kl:
                break
        return _update_statistics(results)

    def tokens_per_microbatch(self) -> int:
        """The most tokens of a microbatch, the same on all ranks."""
        return self.rank.tokens_per_microbatch

    def policy_weights(self) -> AdapterWeights:
        """A complete copy of the policy's adapter, on the CPU; empty on ranks other than the first, which take part."""
        weights = self.rank.read_adapter(self.roles.trunk, "policy")
        return weights if self.rank.number == 0 else {}

    def state(self) -> LearnerState:
        """A copy of everything that updates change, on the CPU; see `RankState.state`."""
        return self.rank.state()

    def restore(self, states: Sequence[LearnerState], zero: int) -> None:
        """Restore the states that the ranks saved at this ZeRO stage; see `RankState.restore`."""
        self.rank.restore(states, zero)

    def close(self) -> None:
        """Free what the rank holds."""
        self.rank.close()

    def _score_microbatch(
        self, requested_roles: Collection[str], trajectories: Sequence[ScoredTokens]
    ) -> list[RoleOutputs]:
        with self.rank.memory_for([trajectory.total_length for trajectory in trajectories]):
            return score_microbatch(
                run=self.rank.engine,
                trajectories=trajectories,
                temperature=self.temperature,
                device=self.rank.device,
                requested_roles=requested_roles,
            )

    def _train_minibatch(
        self,
        minibatch: Sequence[Episode | StoredEpisode],
        demonstrations: Sequence[TokenizedDemonstration],
        coefficients: StepCoefficients,
    ) -> MinibatchResult:
        """Take one optimizer step."""
        weight = math.fsum(episode.total_weight for episode in minibatch)
        objectives = ppo_objectives(self.roles, self.ppo, self.policy_loss, self.temperature, coefficients.kl_in_loss)
        if self.rank.zero == 3:
            # DeepSpeed expects the first backward pass of a step to reach every trained parameter.
            objectives = [summed(objectives)]
        collate = partial(collate_episodes, device=self.rank.device)
        statistics = self.rank.backward(minibatch, weight, objectives, collate, maxima=len(MAXIMA))  # [10]
        sums, maxima = statistics.split([len(STATISTICS), len(MAXIMA)])
        ptx_loss = self._backward_demonstrations(demonstrations) if demonstrations else 0.0
        outcome = self.rank.step({"policy": coefficients.policy_lr, "critic": coefficients.critic_lr})
        return MinibatchResult(sums, maxima, weight, ptx_loss, self._seconds_at_peak(minibatch), outcome)

    def _seconds_at_peak(self, minibatch: Sequence[Episode | StoredEpisode]) -> float:
        """Seconds that training on the episodes takes at the peak of all GPUs; 0 where it is not known."""
        if self.utilization is None:
            return 0.0
        return self.utilization.seconds([episode.length for episode in minibatch])

    def _backward_demonstrations(self, demonstrations: Sequence[TokenizedDemonstration]) -> float:
        """Accumulate the gradient of the demonstrations. Returns their loss in nats per token."""
        tokens = sum(demonstration.trained_tokens for demonstration in demonstrations)
        weight = tokens / self.ppo.ptx_coefficient
        collate = partial(collate_demonstrations, device=self.rank.device)
        objective = partial(likelihood_objective, role="policy")
        return float(self.rank.backward(demonstrations, weight, [objective], collate)) / tokens


def _update_statistics(results: Sequence[MinibatchResult]) -> dict[str, float]:
    """Means and maxima over the tokens of all optimizer steps of an update."""
    sums = torch.zeros(len(STATISTICS), dtype=torch.float64)  # [9]
    weight = 0.0
    for result in results:
        sums = sums + result.sums
        weight += result.weight
    statistics = {name: float(total) / weight for name, total in zip(STATISTICS, sums, strict=True)}
    maxima = torch.stack([result.maxima for result in results]).amax(0)  # [1]
    statistics |= zip(MAXIMA, maxima.tolist(), strict=True)
    statistics["ptx_loss"] = sum(result.ptx_loss for result in results) / len(results)
    statistics["seconds_at_peak"] = sum(result.seconds_at_peak for result in results)
    statistics["optimizer_steps"] = len(results)
    statistics["skipped_steps"] = sum(result.outcome.skipped for result in results)
    for role in TRAINED_ROLES:
        norms = (result.outcome.norms.get(role, math.nan) for result in results)
        statistics[f"{role}_gradient_norm"] = _finite_mean(norms)
    return statistics


def _finite_mean(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
