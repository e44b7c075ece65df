"""Repetition within the response as a term."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from rewards.terms.base import TextTermSettings
from rewards.user_functions import ScoreFunction


class RepetitionTerm(TextTermSettings):
    """Minus the share of the response's word `n`-grams that occurred in it before."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1)

    def make_function(self, name: str) -> ScoreFunction:
        """Minus the share of repeated n-grams."""

        def score(
            prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
        ) -> list[float]:
            return [-_repeated_share(response, self.n) for response in responses]

        return score


def _repeated_share(text: str, n: int) -> float:
    words = text.split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
