"""The length-controlled win rate: how often a model would win if its responses were as long as the other's."""

from dataclasses import dataclass

import torch
from scipy.stats import t as student
from torch import Tensor

NEWTON_STEPS = 50
"""Newton steps, of which a handful suffices unless the wins are separable."""
LARGEST_LOGIT = 15.0
"""A coefficient beyond this means that the wins are separable: the likelihood has no maximum."""


@dataclass(frozen=True)
class LengthControlled:
    """A length-controlled win rate with its 95 % interval.

    Attributes:
        win_rate: From 0 to 1.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    win_rate: float
    low: float
    high: float


def length_controlled_win_rate(wins: Tensor, length_differences: Tensor) -> LengthControlled | None:
    """Win rate at equal lengths, by a logistic regression of the wins on the length difference.

    P(win) = σ(θ + φ · tanh(Δ / s)), with Δ the difference of the lengths and s its standard deviation; the win rate
    at Δ = 0 is σ(θ). This is the model of Dubois et al. 2024 ("Length-controlled AlpacaEval", section 3) without the
    difficulty of each prompt, which they estimate from many models, and by plain maximum likelihood. The interval is
    Student's t of θ with the sandwich variance (White 1982), which also holds for ties.

    Args:
        wins: `[n]`, 1 for a win, ½ for a tie, else 0.
        length_differences: `[n]`, tokens of the model's response less those of the other's.

    Returns:
        The win rate; None where it cannot be estimated: lengths that do not differ, or wins that the length, or a
        constant, tells without error, so that the likelihood has no maximum.
    """
    wins = wins.double()
    differences = length_differences.double()
    if len(wins) < 3 or not bool((differences != differences[0]).any()):
        return None
    scaled = torch.tanh(differences / differences.std(correction=0))  # [n]
    features = torch.stack([torch.ones_like(scaled), scaled], dim=-1)  # [n, 2]
    coefficients = _fit(features, wins)
    if coefficients is None:
        return None
    variance = _sandwich(features, wins, coefficients)
    half_width = float(student.ppf(0.975, len(wins) - 2)) * float(variance[0, 0].sqrt())
    theta = float(coefficients[0])
    ends = torch.tensor([theta, theta - half_width, theta + half_width], dtype=torch.float64).sigmoid().tolist()
    return LengthControlled(win_rate=ends[0], low=ends[1], high=ends[2])


def _fit(features: Tensor, wins: Tensor) -> Tensor | None:
    """The coefficients `[2]` of maximum likelihood, by Newton's method; None where there is no maximum."""
    coefficients = torch.zeros(features.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        chances = (features @ coefficients).sigmoid()  # [n]
        gradient = features.T @ (wins - chances)  # [2]
        step = torch.linalg.lstsq(_information(features, chances), gradient[:, None]).solution[:, 0]
        coefficients = coefficients + step
        if not bool((coefficients.abs() < LARGEST_LOGIT).all()):  # also NaN
            return None
        if float(step.abs().max()) < 1e-10:
            return coefficients
    return None


def _information(features: Tensor, chances: Tensor) -> Tensor:
    """Fisher's information `[2, 2]`."""
    return features.T @ (features * (chances * (1 - chances))[:, None])


def _sandwich(features: Tensor, wins: Tensor, coefficients: Tensor) -> Tensor:
    """The variance `[2, 2]` of the coefficients that does not assume wins of 0 and 1."""
    chances = (features @ coefficients).sigmoid()
    scores = features * (wins - chances)[:, None]  # [n, 2]
    inverse = torch.linalg.inv(_information(features, chances))
    count = len(wins)
    return inverse @ (scores.T @ scores) @ inverse * count / (count - features.shape[1])
