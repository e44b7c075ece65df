"""Compares the responses of two policies to the same prompts. Pure functions."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from align.evaluation.intervals import share_with_interval, with_interval
from align.evaluation.length_control import length_controlled_win_rate


@dataclass(frozen=True)
class ScoredResponses:
    """One policy's responses to n prompts.

    Attributes:
        scores: Scores by the reward `[n]`.
        lengths: Tokens `[n]`.
        gold: Gold scores `[n]`; None where there are none.
    """

    scores: Tensor
    lengths: Tensor
    gold: Tensor | None = None

    def figures(self) -> dict[str, float]:
        """Mean score, gold score and length, with Student's intervals."""
        figures = with_interval("score_mean", self.scores)
        if self.gold is not None:
            figures |= with_interval("gold_mean", self.gold)
        return figures | with_interval("length_mean", self.lengths)


def comparison_figures(policy: ScoredResponses, against: ScoredResponses) -> dict[str, dict[str, float]]:
    """Compare two policies on the same n prompts.

    Args:
        policy: Responses of the first.
        against: Responses of the second, in the same order.

    Returns:
        `against`, the means of the second; and `policy`, those of the first, with the mean gain over the second and
        the win rates, each with its interval where it has one.
    """
    longer = policy.lengths.double() - against.lengths.double()  # [n]
    figures = policy.figures() | _compared("score", "", policy.scores - against.scores, longer)
    if policy.gold is not None and against.gold is not None:
        figures |= _compared("gold", "gold_", policy.gold - against.gold, longer)
    return {"policy": figures, "against": against.figures()}


def _compared(score: str, prefix: str, difference: Tensor, longer: Tensor) -> dict[str, Any]:
    """Gain and win rates from score differences `[n]` and length differences `[n]`."""
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()  # [n]
    figures: dict[str, Any] = with_interval(f"{score}_gain", difference)
    figures |= share_with_interval(f"{prefix}win_rate", wins)
    if controlled := length_controlled_win_rate(wins, longer):
        name = f"{prefix}length_controlled_win_rate"
        figures |= {name: controlled.win_rate, f"{name}_low": controlled.low, f"{name}_high": controlled.high}
    return figures
