"""Estimates for responses that contain tokens which the policy has not sampled, such as the output of a tool.

Only the policy's tokens are actions. The others are part of what the policy sees next: they take no time, so that
neither γ nor λ decays over them, and they have no loss.

Shapes: T tokens of one response, A ≤ T tokens of it that the policy has sampled.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.algorithms.estimators import AdvantageEstimator, EstimatorInput
from rollouts.trajectory import RoleOutputs, Trajectory, policy_mask


def estimate_over_policy_tokens(
    estimate: AdvantageEstimator, batch: EstimatorInput, masks: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Estimate advantages and returns as if the responses consisted of the policy's tokens alone.

    Args:
        estimate: Any estimator.
        batch: Rewards `[T]` and values `[T + 1]` of all tokens.
        masks: `[T]` bool of each response: whether the policy has sampled the token; at least one is true.

    Returns:
        Advantages `[T]` and returns `[T]` of each response, 0 where the token is not the policy's; returns are empty
        without a critic.

    Raises:
        ValueError: The policy has sampled no token of a response.
    """
    rewards: list[Tensor] = []
    values: list[Tensor] = []
    for response_rewards, response_values, mask in zip(batch.rewards, batch.values, masks, strict=True):
        rewards.append(policy_rewards(response_rewards, mask))
        values.append(policy_values(response_values, mask))
    advantages, returns = estimate(replace(batch, rewards=rewards, values=values))
    spread_advantages = [at_policy_tokens(values, mask) for values, mask in zip(advantages, masks, strict=True)]
    spread_returns = [at_policy_tokens(values, mask) for values, mask in zip(returns, masks, strict=True)]
    return spread_advantages, spread_returns


def policy_rewards(rewards: Tensor, mask: Tensor) -> Tensor:
    """The rewards of the policy's tokens; each also gets those of the other tokens up to its next one.

    What comes before the first of the policy's tokens is added to that one, so that the total stays the same.

    Args:
        rewards: `[T]` float32.
        mask: `[T]` bool, whether the policy has sampled the token.

    Returns:
        `[A]` float32.

    Raises:
        ValueError: The policy has sampled no token.
    """
    count = int(mask.sum())
    if count == 0:
        raise ValueError(f"none of the {len(mask)} tokens is the policy's")
    token = (mask.cumsum(0) - 1).clamp(min=0)  # [T], the last of the policy's tokens so far
    return torch.zeros(count, dtype=rewards.dtype).index_add(0, token, rewards)  # [A]


def policy_values(values: Tensor, mask: Tensor) -> Tensor:
    """The critic's values before each of the policy's tokens and after the last token of the response.

    Args:
        values: `[T + 1]` float32, or empty without a critic.
        mask: `[T]` bool, whether the policy has sampled the token.

    Returns:
        `[A + 1]` float32, or empty.
    """
    if len(values) == 0:
        return values
    return torch.cat([values[:-1][mask], values[-1:]])  # [A + 1]


def token_weights(weight: float, mask: Tensor) -> Tensor:
    """The weight of each token in the weighted mean that every loss is.

    Args:
        weight: The weight of the policy's tokens.
        mask: `[T]` bool, whether the policy has sampled the token.

    Returns:
        `[T]` float32: the weight, and 0 where the token is not the policy's.
    """
    return weight * mask.float()


def at_policy_tokens(estimates: Tensor, mask: Tensor) -> Tensor:
    """Put estimates at the places of the policy's tokens.

    Args:
        estimates: `[A]` float32, or empty without a critic.
        mask: `[T]` bool, whether the policy has sampled the token.

    Returns:
        `[T]` float32, 0 where the token is not the policy's; or empty.
    """
    if len(estimates) == 0:
        return estimates
    places = torch.zeros(len(mask), dtype=estimates.dtype)
    places[mask] = estimates
    return places


def policy_part(trajectory: Trajectory, outputs: RoleOutputs) -> tuple[Trajectory, RoleOutputs]:
    """A response and its role outputs as if it consisted of the policy's tokens alone.

    Args:
        trajectory: T tokens.
        outputs: Its role outputs, with log-probabilities, values and step rewards of all tokens.

    Returns:
        The same of its A tokens that the policy has sampled; unchanged where these are all.
    """
    if not trajectory.inserted:
        return trajectory, outputs
    mask = policy_mask(trajectory.length, trajectory.inserted)
    tokens = [token for token, is_policys in zip(trajectory.response_ids, mask.tolist(), strict=True) if is_policys]
    versions = [version for version, is_policys in zip(trajectory.versions, mask.tolist(), strict=True) if is_policys]
    alone = replace(
        trajectory,
        response_ids=tuple(tokens),
        sampler_logprobs=trajectory.sampler_logprobs[mask],
        versions=tuple(versions),
        inserted=(),
    )
    steps = outputs.step_rewards
    return alone, replace(
        outputs,
        logprobs=outputs.logprobs[mask],
        reference_logprobs=outputs.reference_logprobs[mask],
        values=policy_values(outputs.values, mask),
        step_rewards=None if steps is None else policy_rewards(steps, mask),
    )
