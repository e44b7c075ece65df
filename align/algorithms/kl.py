"""KL to the reference: estimators a token, and the coefficient that weighs them."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy ‖ reference) a token, estimated from samples of the policy. Shapes `[T]`, nats.

    With d = log π - log π_ref (Schulman 2020, "Approximating KL Divergence"):
    k1 = d, unbiased, may be negative; k2 = d²/2, biased, low variance; k3 = e^(-d) - 1 + d, unbiased, never negative.
    """
    difference = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: k1, k2 or k3")


class KlCoefficient(Protocol):
    """What weighs the KL. `value` is the state that a checkpoint holds."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Learn the mean KL of a sequence, in nats, over so many episodes."""
        ...


@dataclass
class FixedKl:
    """The same coefficient throughout."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        pass  # fixed: there is nothing to learn


@dataclass
class AdaptiveKl:
    """A coefficient that steers the KL of a sequence to a target (Ziegler et al. 2019, section 2.2).

    β ← β · (1 + clip(KL / target - 1, ±0.2) · episodes / horizon), kept within [1e-6, 1e3].
    """

    value: float
    target: float
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value = min(max(self.value * (1.0 + error * min(episodes / self.horizon, 1.0)), 1e-6), 1e3)
