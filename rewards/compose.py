"""Composes the scores of several terms: normalised, clipped, weighted, and subject to a bound on a cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards.constraint import ConstraintSettings
from rewards.terms.base import TermSettings

SMALLEST_STD = 1e-8
SMALLEST_RELATIVE_STD = 1e-6
"""A standard deviation of at most `SMALLEST_STD`, or this share of the mean, is rounding: the values are constant."""


def combine(members: Tensor, how: str, penalty: float = 1.0) -> Tensor:
    """Combine the scores of an ensemble into one.

    The minimum, or the mean minus a multiple of the spread, is a conservative estimate where the members disagree
    (Coste et al. 2024, "Reward model ensembles help mitigate overoptimization"). Their eq. 5 subtracts a multiple of
    the variance; `mean_minus_std` subtracts one of the standard deviation, which has the unit of a score.

    mean: (1/K) Σ_k r_k;  minimum: min_k r_k;  mean_minus_std: (1/K) Σ_k r_k - penalty · std_k r_k

    Args:
        members: Scores `[B, members]`, each member's with mean 0 and standard deviation 1 over SFT responses.
        how: `mean`, `minimum` or `mean_minus_std`.
        penalty: Standard deviations that `mean_minus_std` subtracts.

    Returns:
        Scores `[B]`.
    """
    if how == "minimum":
        return members.amin(-1)
    mean = members.mean(-1)
    return mean if how == "mean" else mean - penalty * spread(members)


def spread(members: Tensor) -> Tensor:
    """Standard deviation `[B]` over an ensemble's scores `[B, members]`, without Bessel's correction."""
    return members.std(-1, correction=0)


@dataclass
class RunningMoments:
    """Mean and sum of squared deviations of all values seen so far (Chan et al. 1979, eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Update by values `[B]` float64."""
        count = len(values)
        mean = float(values.mean())
        total = self.count + count
        difference = mean - self.mean
        self.squares += float((values - mean).square().sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total

    @property
    def std(self) -> float:
        """The standard deviation; 1 where there are no values or they are constant."""
        std = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return std if std > max(SMALLEST_STD, SMALLEST_RELATIVE_STD * abs(self.mean)) else 1.0


@dataclass
class Composition:
    """The weighted sum of a reward's terms, with the state that it depends on.

    Attributes:
        terms: The settings of the terms by name.
        constraint: The bound on a term that is a cost, if there is one.
        moments: Moments of the terms that are normalised, by name.
        multiplier: λ of the constraint; 0 without one.
    """

    terms: Mapping[str, TermSettings]
    constraint: ConstraintSettings | None = None
    moments: dict[str, RunningMoments] = field(default_factory=dict)
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        self.moments = {name: RunningMoments() for name, term in self.terms.items() if term.normalise != "no"}
        self.multiplier = self.constraint.start if self.constraint else 0.0

    @property
    def is_stateful(self) -> bool:
        """Whether training changes the composition, so that the same response may have another score later."""
        return self.constraint is not None or any(term.normalise == "running" for term in self.terms.values())

    @property
    def calibrated(self) -> list[str]:
        """The names of the terms that are normalised over SFT responses."""
        return [name for name, term in self.terms.items() if term.normalise == "sft"]

    @property
    def factors(self) -> dict[str, float]:
        """The factor with which each term's score, normalised and clipped, enters the composed score now."""
        factors = {name: term.weight for name, term in self.terms.items()}
        if self.constraint:
            factors[self.constraint.term] = -self.multiplier
        return {name: factor / (1 + self.multiplier) for name, factor in factors.items()}

    def calibrate(self, raw: Mapping[str, Tensor]) -> None:
        """Set the moments of the terms that are normalised over SFT responses.

        Args:
            raw: Scores `[N]` of SFT responses by term, before they are normalised.
        """
        for name in self.calibrated:
            self.moments[name] = RunningMoments()
            self.moments[name].add(raw[name].double())

    def score(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compose the terms' scores into one, without an update.

        Args:
            raw: Scores `[B]` by term, before they are normalised.

        Returns:
            The composed scores `[B]` float64, and those of each term `[B]` float64, normalised and clipped, but not
            weighted.
        """
        parts = {name: self._normalised(name, values.double()) for name, values in raw.items()}
        cost = self.constraint.term if self.constraint else None
        total = torch.zeros_like(next(iter(parts.values())))
        for name, values in parts.items():
            if name != cost:
                total = total + self.terms[name].weight * values
        if cost:
            total = (total - self.multiplier * parts[cost]) / (1 + self.multiplier)
        return total, parts

    def score_and_update(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compose the scores of a training batch, as `score` does, and update the state.

        Running moments are updated first, so that they include this batch; the multiplier is updated last.
        """
        for name, term in self.terms.items():
            if term.normalise == "running":
                self.moments[name].add(raw[name].double())
        total, parts = self.score(raw)
        if constraint := self.constraint:
            excess = float(parts[constraint.term].mean()) - constraint.at_most
            self.multiplier = max(0.0, self.multiplier + constraint.rate * excess)
        return total, parts

    def state(self) -> dict[str, Any]:
        """The moments and the multiplier as they are now, for JSON."""
        moments = {name: asdict(values) for name, values in self.moments.items()}
        return {"moments": moments, "multiplier": self.multiplier}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a saved state, except for terms that the experiment no longer normalises."""
        for name, values in state["moments"].items():
            if name in self.moments:
                self.moments[name] = RunningMoments(**values)
        self.multiplier = state["multiplier"] if self.constraint else 0.0

    def _normalised(self, name: str, values: Tensor) -> Tensor:
        """The scores `[B]` of a term, normalised and clipped as its settings say."""
        if moments := self.moments.get(name):
            values = (values - moments.mean) / moments.std
        clip = self.terms[name].clip
        return values if clip is None else values.clamp(*clip)
