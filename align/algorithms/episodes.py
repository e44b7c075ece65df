"""Episodes: what the learner trains on, built from sampled and scored responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.algorithms.advantages import scale_rewards, token_rewards, whiten
from align.algorithms.estimators import EstimatorInput, load_estimator
from align.algorithms.kl import estimate_kl
from align.algorithms.policy_tokens import at_policy_tokens, policy_part
from align.config.ppo_settings import PpoSettings
from rollouts.trajectory import RoleOutputs, Trajectory, policy_mask


@dataclass(frozen=True)
class Episode:
    """One response of T tokens with its targets.

    Tensors are `[T]` float32, on the CPU, without padding, and own their storage.

    Attributes:
        prompt_ids: Tokens of the prompt.
        response_ids: The T tokens of the response.
        old_logprobs: Log-probabilities of the response under the policy before the update, in nats.
        reference_logprobs: The same under the reference.
        advantages: Whitened over the batch if the settings say so, then multiplied by the truncated importance weights:
            the policy loss is homogeneous in the advantages, so this weights the loss.
        returns: Targets of the critic, in units of the reward, never whitened; empty without a critic.
        old_values: Values of the critic before the update, in the same units; empty without a critic.
        weight: Weight of each token in the weighted mean that every loss is.
        inserted: The spans of tokens that the policy has not sampled, as of `Trajectory`: their weight is 0, and so are
            their advantages and returns.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weight: float = 1.0
    inserted: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def total_weight(self) -> float:
        """Weights of all response tokens."""
        return self.weight * (len(self.response_ids) - sum(end - start for start, end in self.inserted))

    @property
    def token_weights(self) -> Tensor:
        """The weight of each response token, `[T]` float32."""
        weights = torch.full((len(self.response_ids),), self.weight)  # [T]
        for start, end in self.inserted:
            weights[start:end] = 0.0
        return weights

    def of_policy(self, values: Tensor) -> Tensor:
        """Of values `[T]` of the response tokens, those of the tokens that the policy has sampled."""
        return values[policy_mask(len(values), self.inserted)] if self.inserted else values

    def load(self) -> "Episode":
        """The episode itself, which is in memory; others are in a shard, see `StoredEpisode`."""
        return self


def make_episodes(
    trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], ppo: PpoSettings, coefficient: float
) -> list[Episode]:
    """Compute advantages and returns of a whole batch.

    Tokens that the policy has not sampled are left out: they take no time, and have neither loss nor KL.

    Args:
        trajectories: B trajectories; those of one prompt are adjacent.
        scored: The role outputs of each trajectory, with its score.
        ppo: The settings of PPO.
        coefficient: Weight of the KL; read only where the KL is part of the reward.

    Returns:
        B episodes, in the same order.

    Raises:
        UserError: The user's advantage estimator failed, or returned something else than one tensor per response.
    """
    parts = [policy_part(*pair) for pair in zip(trajectories, scored, strict=True)]
    sampled = [trajectory for trajectory, _ in parts]
    outputs_of_sampled = [outputs for _, outputs in parts]
    advantages, returns = _estimate(sampled, outputs_of_sampled, ppo, coefficient)
    if ppo.whitens_advantages:
        advantages = _over_the_batch(whiten, advantages)
    if ppo.importance_ratio_cap:
        advantages = _importance_weighted(advantages, sampled, outputs_of_sampled, ppo.importance_ratio_cap)
    episodes = []
    for i, (trajectory, outputs) in enumerate(zip(trajectories, scored, strict=True)):
        episode = Episode(
            prompt_ids=trajectory.request.prompt_ids,
            response_ids=trajectory.response_ids,
            old_logprobs=outputs.logprobs,
            reference_logprobs=outputs.reference_logprobs,
            # Clones, because a view drags the whole batch along when it is sent to a rank.
            advantages=_among_all_tokens(advantages[i], trajectory).clone(),
            returns=_among_all_tokens(returns[i], trajectory).clone(),
            old_values=outputs.values[:-1].clone(),
            weight=1.0 if ppo.loss_aggregation == "token_mean" else 1.0 / sampled[i].length,
            inserted=trajectory.inserted,
        )
        episodes.append(episode)
    return episodes


def _among_all_tokens(estimates: Tensor, trajectory: Trajectory) -> Tensor:
    """Estimates of the policy's tokens at their places among all T tokens of a response; 0 at the others."""
    if not trajectory.inserted:
        return estimates
    return at_policy_tokens(estimates, policy_mask(trajectory.length, trajectory.inserted))


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights, which correct for the mismatch between sampler and learner.

    min(π_learner / π_sampler, cap)                                                     Ionides 2008

    Args:
        logprobs: `[T]`, log-probabilities of the response tokens under the learner's policy, in nats.
        sampler_logprobs: `[T]`, the same as the sampler computed them.
        cap: The largest weight.

    Returns:
        `[T]` float32.
    """
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap)


def shaped_score(score: float, length: int, truncated: bool, ppo: PpoSettings) -> float:
    """The score of a response of `length` tokens minus the penalties for its length and for truncation."""
    return score - ppo.length_penalty * length - (ppo.truncation_penalty if truncated else 0.0)


def _estimate(
    trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], ppo: PpoSettings, coefficient: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of each response, `[T]` each, by the estimator that the settings name."""
    reward_coefficient = 0.0 if ppo.kl.where == "loss" else coefficient
    rewards = []
    values = []
    for trajectory, outputs in zip(trajectories, scored, strict=True):
        rewards.append(_token_rewards(trajectory, outputs, ppo, reward_coefficient))
        values.append(_values(trajectory, outputs, ppo))
    if ppo.whiten_rewards:
        rewards = _over_the_batch(scale_rewards, rewards)
    batch = EstimatorInput(
        rewards=rewards,
        values=values,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        samples_per_prompt=ppo.samples_per_prompt,
    )
    advantages, returns = load_estimator(ppo.estimator)(batch)
    return list(advantages), list(returns)


def _over_the_batch(function: Callable[[Tensor], Tensor], responses: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function to the values of all tokens of a batch, passed and returned as one tensor per response."""
    lengths = [len(response) for response in responses]
    return list(torch.split(function(torch.cat(list(responses))), lengths))


def _importance_weighted(
    advantages: Sequence[Tensor], trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], cap: float
) -> list[Tensor]:
    """The advantages of each response multiplied by its importance weights."""
    weighted = []
    for response_advantages, trajectory, outputs in zip(advantages, trajectories, scored, strict=True):
        weights = importance_weights(outputs.logprobs, trajectory.sampler_logprobs, cap)
        weighted.append(response_advantages * weights)
    return weighted


def _is_bootstrapped(trajectory: Trajectory, ppo: PpoSettings) -> bool:
    return not trajectory.ended and ppo.on_truncation == "bootstrap"


def _token_rewards(trajectory: Trajectory, outputs: RoleOutputs, ppo: PpoSettings, reward_coefficient: float) -> Tensor:
    """Reward of each token, `[T]`; a bootstrapped response gets its step rewards, but no outcome."""
    kl = estimate_kl(outputs.logprobs, outputs.reference_logprobs, ppo.kl_estimator)
    outcome = shaped_score(outputs.outcome, trajectory.length, truncated=not trajectory.ended, ppo=ppo)
    if _is_bootstrapped(trajectory, ppo):
        outcome = 0.0
    return token_rewards(outcome, kl, reward_coefficient, outputs.step_rewards)


def _values(trajectory: Trajectory, outputs: RoleOutputs, ppo: PpoSettings) -> Tensor:
    """The critic's values `[T + 1]`; the last one is 0 where the response is terminal. Empty without a critic."""
    values = outputs.values.clone()
    if len(values) and not _is_bootstrapped(trajectory, ppo):
        values[-1] = 0.0
    return values
