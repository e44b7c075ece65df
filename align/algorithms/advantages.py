"""Rewards and advantages: pure functions of the values of one response, or of all responses of a batch.

Shapes: T tokens of one response, N values of a batch (one per token, or one per response).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

ROUNDING = 1e-6
"""Values whose range is at most this share of the largest one are taken to differ by rounding alone."""
GROUP_EPSILON = 1e-4
"""Added to the standard deviation of a group's rewards, so that small differences are not blown up to full size."""


def has_spread(values: Tensor) -> Tensor:
    """Whether the values of each group differ by more than rounding.

    Args:
        values: `[..., N]`, a group in the last dimension.

    Returns:
        `[...]` bool; True where a value is not a number.
    """
    span = values.amax(-1) - values.amin(-1)
    return ~(span <= ROUNDING * values.abs().amax(-1))


def token_rewards(outcome: float, kl: Tensor, coefficient: float, step_rewards: Tensor | None = None) -> Tensor:
    """Reward of each token of a response: minus the weighted KL, plus its step reward, and on the last one the outcome.

    r_t = -β·KL_t + s_t + [t = T-1]·outcome; without step rewards s_t             Ziegler et al. 2019, eq. 2

    Args:
        outcome: Reward of the complete response.
        kl: `[T]` float32, the estimated KL to the reference at each token, in nats.
        coefficient: β, in units of the score per nat.
        step_rewards: `[T]` float32, s: rewards of single tokens; None: there are none.

    Returns:
        `[T]` float32; `kl` is not modified.
    """
    rewards = -coefficient * kl
    if step_rewards is not None:
        rewards += step_rewards
    rewards[-1] += outcome
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation for one response.

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = Σ_k (γλ)^k δ_{t+k};  R_t = A_t + V_t        Schulman et al. 2016, eq. 16

    Args:
        rewards: `[T]` float32.
        values: `[T + 1]` float32, before each token and after the last; the last is 0 where the response is terminal,
            and the critic's value where it was truncated and would have continued.
        gamma: Discount per token.
        gae_lambda: λ; 1 gives the discounted return minus the value, 0 the one-step advantage.

    Returns:
        Advantages and returns, both `[T]` float32.
    """
    ((advantages, returns),) = batch_gae([rewards], [values], gamma, gae_lambda)
    return advantages, returns


def batch_gae(
    rewards: Sequence[Tensor], values: Sequence[Tensor], gamma: float, gae_lambda: float
) -> list[tuple[Tensor, Tensor]]:
    """Generalized advantage estimation for several responses at once: for each what `gae` returns."""
    errors = []
    for response_rewards, response_values in zip(rewards, values, strict=True):
        errors.append(response_rewards + gamma * response_values[1:] - response_values[:-1])  # [T]
    estimates = []
    for advantages, response_values in zip(discounted_sums(errors, gamma * gae_lambda), values, strict=True):
        estimates.append((advantages, advantages + response_values[:-1]))
    return estimates


def discounted_sums(responses: Sequence[Tensor], discount: float) -> list[Tensor]:
    """Discounted sums of each value and all later ones: s_t = x_t + c·s_{t+1}, computed in float64.

    Those of rewards are the rewards to go; whitened, they are the advantage of REINFORCE++      Hu 2025, eq. 5 and 6

    Args:
        responses: B responses, at least one; `[T]` float32 of each.
        discount: c.

    Returns:
        `[T]` float32 of each response; views of one tensor.
    """
    padded = pad_sequence(list(responses), batch_first=True)  # [B, longest T], with zeros after the end of a response
    columns = padded.T.contiguous().double()  # [longest T, B]
    later = np.zeros(len(responses))
    for row in columns.numpy()[::-1]:  # the same token of all responses: a loop over tokens, not one per response
        row += discount * later
        later = row
    sums = columns.float().T.contiguous()  # [B, longest T]
    return [sums[i, : len(response)] for i, response in enumerate(responses)]


def rloo(totals: Tensor, samples: int) -> Tensor:
    """Total reward of each response minus the mean of the other responses to its prompt.

    A_i = R_i - (Σ_{j≠i} R_j) / (K - 1), and 0 where the group has no spread          Ahmadian et al. 2024, eq. 8

    Args:
        totals: `[N]`, total reward of each response; those to one prompt are adjacent.
        samples: K, responses per prompt, at least 2.

    Returns:
        `[N]`, one advantage per response.
    """
    groups = totals.view(-1, samples)  # [prompts, K]
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return _where_spread(groups, groups - others)


def grpo(totals: Tensor, samples: int) -> Tensor:
    """Total reward of each response, standardised within its prompt.

    A_i = (R_i - mean R) / (std R + 1e-4), and 0 where the group has no spread     Shao et al. 2024, section 4.1.2

    Args:
        totals: `[N]`, total reward of each response; those to one prompt are adjacent.
        samples: K, responses per prompt.

    Returns:
        `[N]` float32, one advantage per response.
    """
    groups = totals.double().view(-1, samples)  # [prompts, K]
    centred = groups - groups.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()  # [prompts, 1]
    return _where_spread(groups, centred / (std + GROUP_EPSILON)).float()


def _where_spread(groups: Tensor, advantages: Tensor) -> Tensor:
    """Advantages `[prompts, K]` as `[N]`, and zeros for the groups of total rewards `[prompts, K]` without spread."""
    return torch.where(has_spread(groups).unsqueeze(1), advantages, 0.0).flatten()


def scale_rewards(rewards: Tensor) -> Tensor:
    """Scale the token rewards of a batch, `[N]`, to standard deviation 1 about their mean (Huang et al. 2024)."""
    mean = rewards.mean()
    return whiten(rewards) + mean


def whiten(advantages: Tensor) -> Tensor:
    """Shift and scale values to mean 0 and (population) standard deviation 1.

    Args:
        advantages: `[N]`, of any floating dtype.

    Returns:
        `[N]` float32; zeros where there is only one value, or no spread.
    """
    if not has_spread(advantages):
        return torch.zeros_like(advantages, dtype=torch.float32)
    # In float32 the mean of nearly equal values may be off by a rounding error, which the division would amplify.
    centred = advantages.to(torch.float64, copy=True)
    centred -= centred.mean()
    centred /= centred.square().mean().sqrt() + 1e-8
    return centred.float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the variance of the returns that the critic's values explain: 1 - Var(R - V) / Var(R).

    Args:
        values: `[N]`, the critic's values of all tokens of a batch.
        returns: `[N]`.

    Returns:
        1 for a perfect critic, 0 for one no better than a constant, NaN where the returns have no spread.
    """
    if not has_spread(returns):
        return float("nan")
    return float(1 - (returns - values).var(correction=0) / returns.var(correction=0))
