"""The length of the response as a term."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from rewards.terms.base import RewardStage, TermInput, TermScores, TermSettings


class LengthTerm(TermSettings):
    """0 up to `max_tokens - window` tokens, then falling to -1 at `max_tokens` (Yu et al. 2025, "DAPO", eq. 13)."""

    kind: Literal["length"]
    max_tokens: int = Field(ge=1)
    window: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _window_fits(self) -> "LengthTerm":
        if self.window > self.max_tokens:
            raise ValueError(f"window {self.window} is longer than max_tokens, {self.max_tokens}")
        return self

    def make_scorer(self, name: str, stage: RewardStage) -> "LengthScorer":
        """A scorer of the number of tokens."""
        return LengthScorer(self.max_tokens, self.window)


@dataclass(frozen=True)
class LengthScorer:
    """0, falling linearly to -1 over the last `window` tokens before `max_tokens`."""

    max_tokens: int
    window: int

    def __call__(self, batch: TermInput, /) -> TermScores:
        import torch

        excess = torch.tensor([length - self.max_tokens for length in batch.response_lengths], dtype=torch.float64)
        if not self.window:
            return TermScores(-(excess > 0).double())
        return TermScores(-(1 + excess / self.window).clamp(0, 1))
