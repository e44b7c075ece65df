"""Rewards and advantages: pure functions of the numbers of one response, or of all responses of a batch."""

import torch
from torch import Tensor


def token_rewards(score: float, kl: Tensor, coefficient: float) -> Tensor:
    """Reward of each response token, `[T]`: minus the weighted KL everywhere, the score on the last token.

    r_t = -β·KL_t + [t = T-1]·score                                         Ziegler et al. 2019, eq. 2
    """
    rewards = -coefficient * kl
    rewards[-1] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one response of T tokens, both `[T]` float32.

    rewards: `[T]`. values: `[T + 1]`, before each token and after the last; the last is 0 where the response is
    terminal and the critic's value where it was cut and goes on.

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = Σ_k (γλ)^k δ_{t+k};  R_t = A_t + V_t        Schulman et al. 2016, eq. 16
    """
    deltas = (rewards + gamma * values[1:] - values[:-1]).tolist()
    advantage, backwards = 0.0, []
    for delta in reversed(deltas):
        advantage = delta + gamma * gae_lambda * advantage
        backwards.append(advantage)
    advantages = torch.tensor(backwards[::-1], dtype=torch.float32)
    return advantages, advantages + values[:-1]


def rewards_to_go(rewards: Tensor, gamma: float) -> Tensor:
    """Sum of what is still to come, `[T]` float32: R_t = Σ_k γ^k r_{t+k}.

    Whitened over the batch it is the advantage of REINFORCE++                        Hu 2025, eq. 5 and 6
    """
    return gae(rewards, rewards.new_zeros(len(rewards) + 1), gamma, gae_lambda=1.0)[1]


def rloo(totals: Tensor, samples: int) -> Tensor:
    """Total reward of each response less the mean of the others of its prompt, `[N]`; samples: responses a prompt.

    A_i = R_i - (Σ_{j≠i} R_j) / (k - 1)                                              Ahmadian et al. 2024, eq. 8
    """
    groups = totals.view(-1, samples)
    others = (groups.sum(1, keepdim=True) - groups) / (samples - 1)
    return (groups - others).flatten()


def grpo(totals: Tensor, samples: int) -> Tensor:
    """Total reward of each response, whitened within its prompt, `[N]`; samples: responses a prompt.

    A_i = (R_i - mean R) / std R, and 0 where all of a prompt are the same           Shao et al. 2024, section 4.1.2
    """
    return torch.cat([whiten(group) for group in totals.split(samples)])


def scale_rewards(rewards: Tensor) -> Tensor:
    """Token rewards of a batch, `[N]`, scaled to deviation 1 about their mean, which stays (Huang et al. 2024)."""
    mean = rewards.mean()
    return whiten(rewards) + mean


def whiten(advantages: Tensor) -> Tensor:
    """Shift and scale all advantages of a batch, `[N]`, to mean 0 and (population) deviation 1.

    One number alone, or numbers that are all the same, become 0.
    """
    # In float32 the mean of equal numbers may be off by a rounding, which the division would scale up.
    exact = advantages.double()
    centred = exact - exact.mean()
    return (centred / (centred.square().mean().sqrt() + 1e-8)).float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), both `[N]`: 1 is a perfect critic, 0 no better than a constant."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else float("nan")
