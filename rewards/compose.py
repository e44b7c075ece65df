"""From the scores of several terms to one: normalised, clipped, weighed, and held under a bound on a cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rewards.terms import ConstraintSettings, TermSettings

SMALL = 1e-8


def combine(members: Tensor, how: str, penalty: float = 1.0) -> Tensor:
    """One score `[B]` of an ensemble's `[B, members]`, each of mean 0 and deviation 1 on SFT responses.

    The minimum, or the mean less some deviations, is a low estimate where the members disagree (Coste et al. 2024,
    "Reward model ensembles help mitigate overoptimization", eq. 4 and 5).
    """
    if how == "minimum":
        return members.amin(-1)
    mean = members.mean(-1)
    return mean if how == "mean" else mean - penalty * spread(members)


def spread(members: Tensor) -> Tensor:
    """Deviation `[B]` of an ensemble's scores `[B, members]`, about their mean."""
    return members.std(-1, correction=0)


@dataclass
class Moments:
    """Mean and sum of squared deviations of all values seen so far (Chan et al. 1979, eq. 2.1)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Values `[B]` float64."""
        count, mean = len(values), float(values.mean())
        total, gap = self.count + count, mean - self.mean
        self.squares += float((values - mean).square().sum()) + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def std(self) -> float:
        """1 where there is none."""
        std = (self.squares / self.count) ** 0.5 if self.count else 0.0
        return std if std > SMALL else 1.0


@dataclass
class Composition:
    """The sum of a reward's terms, and what it knows of them: moments by term, and the multiplier of the constraint."""

    terms: Mapping[str, TermSettings]
    constraint: ConstraintSettings | None = None
    moments: dict[str, Moments] = field(default_factory=dict)
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        self.moments = {name: Moments() for name, term in self.terms.items() if term.normalise != "no"}
        self.multiplier = self.constraint.start if self.constraint else 0.0

    @property
    def learns(self) -> bool:
        """Whether the same response may score otherwise later."""
        return self.constraint is not None or any(term.normalise == "running" for term in self.terms.values())

    @property
    def calibrated(self) -> list[str]:
        """The terms that are normalised by SFT responses."""
        return [name for name, term in self.terms.items() if term.normalise == "sft"]

    def calibrate(self, raw: Mapping[str, Tensor]) -> None:
        """Take up what these terms say `[N]` of SFT responses."""
        for name in self.calibrated:
            self.moments[name] = Moments()
            self.moments[name].add(raw[name].double())

    def score(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Terms `[B]` to scores `[B]` float64, and each term as it goes in: normalised and clipped, not weighed."""
        parts = {name: self._part(name, values.double()) for name, values in raw.items()}
        cost = self.constraint.term if self.constraint else None
        total = torch.zeros_like(next(iter(parts.values())))
        for name, values in parts.items():
            if name != cost:
                total = total + self.terms[name].weight * values
        if cost:
            total = (total - self.multiplier * parts[cost]) / (1 + self.multiplier)
        return total, parts

    def learn(self, raw: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """`score`, by running moments that these values are part of; the multiplier moves after it."""
        for name, term in self.terms.items():
            if term.normalise == "running":
                self.moments[name].add(raw[name].double())
        total, parts = self.score(raw)
        if constraint := self.constraint:
            above = float(parts[constraint.term].mean()) - constraint.at_most
            self.multiplier = max(0.0, self.multiplier + constraint.rate * above)
        return total, parts

    def state(self) -> dict[str, Any]:
        """All that it has learned, for JSON."""
        return {"moments": {name: vars(own) for name, own in self.moments.items()}, "multiplier": self.multiplier}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that was saved; what the experiment no longer normalises is left out."""
        self.moments |= {name: Moments(**own) for name, own in state["moments"].items() if name in self.moments}
        self.multiplier = state["multiplier"] if self.constraint else 0.0

    def _part(self, name: str, values: Tensor) -> Tensor:
        if own := self.moments.get(name):
            values = (values - own.mean) / own.std
        clip = self.terms[name].clip
        return values if clip is None else values.clamp(*clip)
