"""The KL to the reference: its estimators at each token, and the coefficient that weights it."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def estimate_kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(π ‖ π_ref) at each token, estimated from samples of the policy π.

    With d = log π - log π_ref (Schulman 2020, "Approximating KL Divergence"):

    * k1 = d. Its value is unbiased; it may be negative. In the loss its expected gradient is 0.
    * k2 = d²/2. Its value is biased, with low variance. In the loss its gradient is unbiased: in expectation, that of
      KL(π ‖ π_ref).
    * k3 = e^(-d) - 1 + d. Its value is unbiased and never negative. In the loss its gradient is biased: in expectation,
      that of KL(π_ref ‖ π).

    Args:
        logprobs: `[T]`, log-probabilities of the sampled tokens under the policy, in nats.
        reference_logprobs: `[T]`, the same under the reference.
        estimator: `k1`, `k2` or `k3`.

    Returns:
        `[T]`, in nats.

    Raises:
        ValueError: There is no such estimator.
    """
    difference = logprobs - reference_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: expected k1, k2 or k3")


class KlCoefficient(Protocol):
    """The weight of the KL. `value` is its whole state, which checkpoints keep."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Adapt to the mean KL per sequence, in nats, of this many episodes."""
        ...


@dataclass
class FixedKl:
    """A constant coefficient."""

    value: float

    def update(self, kl: float, episodes: int) -> None:
        """Do nothing: the coefficient is fixed."""


@dataclass
class AdaptiveKl:
    """A coefficient that steers the KL per sequence to a target (Ziegler et al. 2019, section 2.2).

    β ← β · (1 + clip(KL / target - 1, ±0.2) · min(episodes / horizon, 1)), kept within [1e-6, 1e3].

    Attributes:
        value: β.
        target: KL per sequence, in nats.
        horizon: Episodes over which the controller acts.
    """

    value: float
    target: float
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """Adapt to the mean KL per sequence of this many episodes; a KL that is not finite changes nothing."""
        if not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        factor = 1.0 + error * min(episodes / self.horizon, 1.0)
        self.value = min(max(self.value * factor, 1e-6), 1e3)
