"""The best policy at each distance from the reference, estimated from samples, and how close a policy comes to it.

For a fixed reward r, the policy that maximises E[r] - β KL(π‖π_ref) is π* ∝ π_ref exp(r / β) (Korbak et al. 2022,
"RL with KL penalties is better viewed as Bayesian inference"). As β falls from infinity, π* moves along the frontier:
no policy has a higher mean reward at the same mean KL over the prompts. Pure functions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from scipy.optimize import brentq
from torch import Tensor

from align.evaluation.intervals import ratio_interval

MIN_EFFECTIVE_SAMPLES = 30.0
"""Smallest mean effective sample size per prompt at which an estimate is given."""
LARGEST_BETA, SMALLEST_BETA = 1e4, 1e-4
"""The range of β in which it is searched, in standard deviations of the scores over a prompt's samples."""


@dataclass(frozen=True)
class FrontierSamples:
    """N responses to each of P prompts. Weights turn them into samples of the best policy at a β.

    Attributes:
        scores: `[N, P]` float64, the reward of each response; N is even.
        log_ratios: `[N, P]` float64, log π/π_ref of each response in nats, π being the policy that has sampled it;
            None: it is the reference.
    """

    scores: Tensor
    log_ratios: Tensor | None = None

    @cached_property
    def spread(self) -> float:
        """The standard deviation of the scores of a prompt, as a root mean square over the prompts."""
        return float(self.scores.var(dim=0, correction=0).mean().sqrt())

    def log_weights(self, beta: float) -> Tensor:
        """`[N, P]`, log of exp(r / β) π_ref / π."""
        tilts = self.scores / beta
        return tilts if self.log_ratios is None else tilts - self.log_ratios


@dataclass(frozen=True)
class FrontierPoint:
    """The best policy at a mean KL over the prompts.

    Attributes:
        kl: The mean KL to the reference, in nats per sequence.
        beta: The β at which it is the best policy.
        effective_samples: The mean over the prompts of 1 / Σ w², the number of unweighted samples that say as much
            (Kish 1965).
    """

    kl: float
    beta: float
    effective_samples: float


@dataclass(frozen=True)
class BestMean:
    """The mean of a score under the best policy at a point of the frontier.

    Attributes:
        values: `[P]` float64. Their mean is the estimate, and their spread that of the estimate with β estimated, too.
        slope: How much the mean grows along the frontier, per nat; that of the reward is β.
    """

    values: Tensor
    slope: float


def frontier_point(samples: FrontierSamples, kl: float) -> FrontierPoint | None:
    """Find the best policy at a mean KL, with one β for all prompts.

    Args:
        samples: Responses to each prompt.
        kl: The mean KL to the reference, in nats per sequence; above 0.

    Returns:
        The point; None where the samples cannot show it: no weights of theirs come so far, their effective number is
        below `MIN_EFFECTIVE_SAMPLES`, or the scores of no prompt differ.
    """
    beta = _beta_at(samples, kl)
    if beta is None:
        return None
    point = FrontierPoint(kl, beta, effective_samples(samples, beta))
    return point if point.effective_samples >= MIN_EFFECTIVE_SAMPLES else None


def _beta_at(samples: FrontierSamples, kl: float) -> float | None:
    """The β at which the mean KL is `kl`; None if there is none in the range."""

    def excess(log_beta: float) -> float:
        return float(best_kl(samples, math.exp(log_beta)).mean()) - kl

    if samples.spread == 0:
        return None
    smallest, largest = (math.log(factor * samples.spread) for factor in (SMALLEST_BETA, LARGEST_BETA))
    if excess(smallest) <= 0 or excess(largest) >= 0:
        return None
    return math.exp(brentq(excess, smallest, largest, xtol=1e-9))


def effective_samples(samples: FrontierSamples, beta: float) -> float:
    """The mean over the prompts of 1 / Σ w², from 1 to N."""
    weights = samples.log_weights(beta).softmax(0)  # [N, P]
    return float((1 / weights.square().sum(0)).mean())


def best_mean(samples: FrontierSamples, values: Tensor, point: FrontierPoint) -> BestMean:
    """Estimate the mean of a score under the best policy.

    Args:
        samples: Responses to each prompt.
        values: `[N, P]` float64, the score of each response: the reward itself, or the gold score.
        point: The best policy.
    """
    beta = point.beta
    slope = _slope(samples, values, beta)
    # Where the KL of a prompt pulls β, the mean moves along the frontier: the delta method.
    pulled = slope * (best_kl(samples, beta) - point.kl)
    return BestMean(_best_values(samples, values, beta) - pulled, slope)


def best_kl(samples: FrontierSamples, beta: float) -> Tensor:
    """KL of the best policy to the reference `[P]`, in nats: E[r / β] - log E_ref[exp(r / β)], E under π*."""

    def estimate(part: slice) -> Tensor:
        log_weights = samples.log_weights(beta)[part]  # [n, P]
        mean = (log_weights.softmax(0) * samples.scores[part]).sum(0)
        return mean / beta - (log_weights.logsumexp(0) - math.log(len(log_weights)))

    return _corrected(estimate, len(samples.scores))


def _best_values(samples: FrontierSamples, values: Tensor, beta: float) -> Tensor:
    """E[values] under the best policy `[P]`, by the normalised weights."""

    def estimate(part: slice) -> Tensor:
        return (samples.log_weights(beta)[part].softmax(0) * values[part]).sum(0)

    return _corrected(estimate, len(values))


def _corrected(estimate: Callable[[slice], Tensor], count: int) -> Tensor:
    """An estimate from all responses without its bias of order 1/N, which the normalisation of the weights causes.

    Twice the estimate from all, less the mean of those from each half (Quenouille 1956).
    """
    middle = count // 2
    halves = estimate(slice(middle)) + estimate(slice(middle, None))
    return 2 * estimate(slice(None)) - halves / 2


def _slope(samples: FrontierSamples, values: Tensor, beta: float) -> float:
    """d E[values] / d KL along the frontier, per nat: β Cov(values, r) / Var(r) under π*, each a mean over the prompts.

    By 1/β, E[values] grows by Cov(values, r), and KL by Var(r) / β.
    """
    weights = samples.log_weights(beta).softmax(0)  # [N, P]
    score = samples.scores - (weights * samples.scores).sum(0)
    value = values - (weights * values).sum(0)
    covariance = (weights * score * value).sum(0).mean()
    variance = (weights * score * score).sum(0).mean()
    return beta * float(covariance / variance)


@dataclass(frozen=True)
class Efficiency:
    """A policy's gain over the reference as a share of the best policy's at the same mean KL.

    Attributes:
        value: The share; 1 on the frontier.
        low: The lower end of its 95 % interval.
        high: The upper end.
    """

    value: float
    low: float
    high: float


def efficiency(gain: Tensor, kl: Tensor, best_gain: Tensor, slope: float) -> Efficiency:
    """How close a policy comes to the frontier, with an interval by the delta method over prompts.

    The policy's KL is estimated, too: where it is overestimated, the policy is compared with a point that is too far
    out, by the slope of the frontier times the error.

    Args:
        gain: `[P]` float64, the policy's score less the reference's on each prompt.
        kl: `[P]` float64, its KL to the reference, in nats.
        best_gain: `[P]` float64, the same gain of the best policy whose mean KL is the mean of `kl`: `BestMean.values`
            less the reference's score.
        slope: How much the best policy's gain grows per nat: `BestMean.slope`.

    Returns:
        The ratio of the mean gains; P must be at least 2.
    """
    best = best_gain + slope * (kl - kl.mean())  # [P]
    ends = ratio_interval(gain, best)
    assert ends is not None  # there are two prompts
    return Efficiency(float(gain.mean() / best.mean()), *ends)
