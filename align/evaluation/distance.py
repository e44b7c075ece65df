"""The figures of the frontier, and of policies beside it. Pure functions.

Scores are those that PPO maximises: the reward less the penalties for length and truncation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.evaluation.frontier import (
    BestMean,
    Efficiency,
    FrontierPoint,
    FrontierSamples,
    best_mean,
    efficiency,
    frontier_point,
)
from align.evaluation.intervals import with_interval

KLS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""The distances at which the frontier is shown, in nats per sequence, as far as the samples show it."""
MIN_KL = 0.3
"""Smallest distance, in nats per sequence, at which an efficiency is given: nearer, both of its gains are small."""


@dataclass(frozen=True)
class DrawnResponses:
    """N responses of one policy to each of P prompts.

    Attributes:
        scores: `[N, P]` float64.
        gold: `[N, P]` float64, their gold scores; None where there are none.
        log_ratios: `[N, P]` float64, log π/π_ref of each in nats; None: the policy is the reference.
    """

    scores: Tensor
    gold: Tensor | None = None
    log_ratios: Tensor | None = None

    @property
    def weighted(self) -> FrontierSamples:
        """The responses as samples that weights turn into those of the best policy."""
        return FrontierSamples(self.scores, self.log_ratios)

    def kinds(self) -> dict[str, Tensor]:
        """Scores and gold scores, by the name in the figures."""
        return {"score": self.scores} | ({} if self.gold is None else {"gold": self.gold})


def frontier_figures(reference: DrawnResponses, kls: Sequence[float] = KLS) -> list[dict[str, Any]]:
    """Gains of the best policy over the reference, at each of some distances that the reference's samples show."""
    figures = []
    for kl in kls:
        point = frontier_point(reference.weighted, kl)
        if point is None:
            break
        figures.append(_point_figures(point) | _with_intervals(_best_gains(reference, reference, point)))
    return figures


def _point_figures(point: FrontierPoint) -> dict[str, Any]:
    return {"kl": point.kl, "beta": point.beta, "effective_samples": point.effective_samples}


def _best_gains(samples: DrawnResponses, reference: DrawnResponses, point: FrontierPoint) -> dict[str, BestMean]:
    """What the best policy gains over the reference in score, and gold score, from samples of either policy."""
    gains = {}
    for name, values in samples.kinds().items():
        best = best_mean(samples.weighted, values, point)
        gains[name] = BestMean(best.values - reference.kinds()[name].mean(0), best.slope)
    return gains


def _with_intervals(gains: Mapping[str, BestMean]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, gain in gains.items():
        figures |= with_interval(f"{name}_gain", gain.values)
    return figures


def policy_distance(
    policy: DrawnResponses, reference: DrawnResponses, further: Callable[[], DrawnResponses] | None = None
) -> dict[str, Any]:
    """How far a policy is from the reference, what it gains, and which share of the best policy's gain that is.

    The best policy is estimated from the reference's samples or, where these do not show it, from those of a policy
    that is as far away.

    Args:
        policy: Responses of the policy, with their log-ratios.
        reference: Responses of the reference to the same prompts, of which there are at least two.
        further: Gives many responses of such a policy, with their log-ratios; it is called where they are needed. None:
            there are none.

    Returns:
        `kl`, `score_gain` and, with a gold score, `gold_gain`, each with `…_low` and `…_high`. Where samples show the
        best policy at this KL, and it is at least `MIN_KL`, its gains under `best`, with `from`: `reference` or
        `policy`; and `score_efficiency` and `gold_efficiency`, with their ends.
    """
    assert policy.log_ratios is not None
    kl = policy.log_ratios.mean(0)  # [P]
    figures: dict[str, Any] = with_interval("kl", kl)
    gains = {}
    for name, values in policy.kinds().items():
        gains[name] = values.mean(0) - reference.kinds()[name].mean(0)
        figures |= with_interval(f"{name}_gain", gains[name])
    distance = figures["kl"]
    if distance < MIN_KL:
        return figures
    for origin, draw in {"reference": lambda: reference, "policy": further}.items():
        samples = draw() if draw else None
        if samples and (point := frontier_point(samples.weighted, distance)):
            best = _best_gains(samples, reference, point)
            for name, gain in gains.items():
                found = efficiency(gain, kl, best[name].values, best[name].slope)
                figures |= _named(f"{name}_efficiency", found)
            return figures | {"best": {"from": origin} | _point_figures(point) | _with_intervals(best)}
    return figures


def _named(name: str, found: Efficiency) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
