"""Repetition within the response as a term."""

from typing import Literal

from pydantic import Field

from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import score_each
from rewards.user_functions import ScoreFunction


class RepetitionTerm(TextTermSettings):
    """Minus the share of the response's word `n`-grams that occurred in it before."""

    kind: Literal["repetition"]
    n: int = Field(3, ge=1)

    def make_function(self, name: str) -> ScoreFunction:
        """A function that counts repeated n-grams."""
        return score_each(lambda response: -_repeated_share(response, self.n))


def _repeated_share(text: str, n: int) -> float:
    words = text.split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
