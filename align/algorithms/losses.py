"""PPO's losses a token. What is summed, and divided by what, is the learner's business."""

import math

import torch
from torch import Tensor


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Loss of each token and whether a clip binds (float 0 or 1), all `[P]`.

    max(-A·ρ, -A·clip(ρ, 1 - low, 1 + high)) with ρ = π/π_old                 Schulman et al. 2017, eq. 7
    and, where A < 0, at most -A·dual, so that a large ratio cannot run away   Ye et al. 2020, eq. 5
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free = -advantages * ratio
    pessimistic = torch.maximum(free, -advantages * ratio.clamp(1 - low, 1 + high))
    loss = torch.where((advantages < 0) & (ratio > dual), -advantages * dual, pessimistic)
    return loss, (loss != free).float()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss of each token and whether the clip binds (float 0 or 1), all `[P]`.

    ½·max((V - R)², (clip(V, V_old ± clip) - R)²); without `clip`, ½·(V - R)².
    """
    free = (values - returns).square()
    if clip is None:
        return free / 2, torch.zeros_like(free)
    clipped = (values.clamp(old_values - clip, old_values + clip) - returns).square()
    return torch.maximum(free, clipped) / 2, (clipped > free).float()
