"""Rewards a token, generalised advantage estimation and whitening: pure functions of one response's numbers."""

import torch
from torch import Tensor


def token_rewards(score: float, kl: Tensor, coefficient: float) -> Tensor:
    """Reward of each response token, `[T]`: minus the weighted KL everywhere, the score on the last token.

    r_t = -β·KL_t + [t = T-1]·score                                         Ziegler et al. 2019, eq. 2
    """
    rewards = -coefficient * kl
    rewards[-1] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of one response of T tokens, both `[T]` float32.

    rewards: `[T]`. values: `[T + 1]`, before each token and after the last; the last is 0 where the response is
    terminal and the critic's value where it was cut and goes on.

    δ_t = r_t + γ·V_{t+1} - V_t;  A_t = Σ_k (γλ)^k δ_{t+k};  R_t = A_t + V_t        Schulman et al. 2016, eq. 16
    """
    deltas = (rewards + gamma * values[1:] - values[:-1]).tolist()
    advantage, backwards = 0.0, []
    for delta in reversed(deltas):
        advantage = delta + gamma * lam * advantage
        backwards.append(advantage)
    advantages = torch.tensor(backwards[::-1], dtype=torch.float32)
    return advantages, advantages + values[:-1]


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
