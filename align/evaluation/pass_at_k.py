"""pass@k: how often one of k samples is right."""

import math

import torch
from torch import Tensor


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """The unbiased estimate of pass@k of each prompt from N samples (Chen et al. 2021, eq. 1).

    1 - C(N - c, k) / C(N, k), with c the number of right samples: the share of all choices of k of the N samples that
    have a right one.

    Args:
        right: `[N, prompts]`, 1 where a sample is right, else 0.
        k: From 1 to N.

    Returns:
        `[prompts]` float64.
    """
    samples = len(right)
    choices = math.comb(samples, k)
    counts = right.sum(0).long().tolist()  # [prompts]
    estimates = [1 - math.comb(samples - count, k) / choices for count in counts]
    return torch.tensor(estimates, dtype=torch.float64)
