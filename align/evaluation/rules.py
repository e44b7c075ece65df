"""Accuracy and pass@k of responses that a rule finds right or wrong. Pure functions."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from align.evaluation.intervals import mean_interval, share_interval
from rewards.diagnostics import Accuracy, accuracy


def rule_figures(right: Mapping[str, Tensor]) -> dict[str, float]:
    """Accuracy, and pass@k for k of 2, 4, 8 … and the number of samples, by term.

    Args:
        right: By term, `[N, prompts]` float64: 1 where a sample is right, else 0; N samples per prompt.

    Returns:
        `accuracy/TERM`, the share of right responses, which is pass@1; with several samples `pass_at_K/TERM`. Each has
        Wilson's 95 % interval, from `…_low/TERM` to `…_high/TERM`, in which the samples of a prompt are correlated.
    """
    figures: dict[str, float] = {}
    for name, samples in right.items():
        count, prompts = samples.shape
        clusters = list(range(prompts)) * count
        figures |= _share(f"accuracy{{}}/{name}", accuracy(samples.flatten() - 0.5, clusters))
        for k in powers_of_two_to(count)[1:]:
            figures |= _share(f"pass_at_{k}{{}}/{name}", share_interval(pass_at_k(samples, k)))
    return figures


def accuracy_gains(policy: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, float]:
    """How much larger the share of right responses is than the reference's, on the same prompts.

    Args:
        policy: As for `rule_figures`.
        reference: The same of the reference.

    Returns:
        `accuracy_gain/TERM`, with Student's 95 % interval over prompts, from `accuracy_gain_low/TERM` to `…_high/TERM`;
        without it where there is one prompt.
    """
    figures: dict[str, float] = {}
    for name, samples in policy.items():
        gains = samples.mean(0) - reference[name].mean(0)  # [prompts]
        figures[f"accuracy_gain/{name}"] = float(gains.mean())
        if ends := mean_interval(gains):
            figures |= {f"accuracy_gain_low/{name}": ends[0], f"accuracy_gain_high/{name}": ends[1]}
    return figures


def pass_at_k(right: Tensor, k: int) -> Tensor:
    """The chance that at least one of k samples of a prompt is right (Chen et al. 2021, "Codex", eq. 1).

    1 - C(n - c, k) / C(n, k), with c of n samples right, is unbiased: it is the share of the choices of k samples that
    have a right one.

    Args:
        right: `[n, prompts]`, 1 where a sample is right, else 0.
        k: From 1 to n.

    Returns:
        `[prompts]` float64.
    """
    count = len(right)
    chances = [1 - math.comb(count - correct, k) / math.comb(count, k) for correct in range(count + 1)]
    return torch.tensor(chances, dtype=torch.float64)[right.sum(0).long()]


def powers_of_two_to(largest: int) -> list[int]:
    """1, 2, 4, … and the largest."""
    powers = [2**exponent for exponent in range(largest.bit_length())]
    return [power for power in powers if power < largest] + [largest]


def _share(form: str, share: Accuracy) -> dict[str, float]:
    """A share and its interval under the names that a form gives with the ends "", "_low" and "_high"."""
    return {
        form.format(""): share.accuracy,
        form.format("_low"): share.accuracy_low,
        form.format("_high"): share.accuracy_high,
    }
