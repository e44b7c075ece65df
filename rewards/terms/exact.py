"""Equality with a reference answer as a term."""

from typing import Literal

from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import compare_with_column
from rewards.user_functions import ScoreFunction


class ExactTerm(TextTermSettings):
    """1 where the response equals the answer in `column`, whatever its case and white space, else 0."""

    kind: Literal["exact"]
    column: str = "answer"

    @property
    def columns(self) -> list[str]:
        """The column of the answer."""
        return [self.column]

    @property
    def is_verifiable(self) -> bool:
        """Yes."""
        return True

    def make_function(self, name: str) -> ScoreFunction:
        """A function that compares response and answer without case and white space."""
        return compare_with_column(self.column, lambda response, answer: _fold(response) == _fold(answer))


def _fold(text: str) -> str:
    return " ".join(text.split()).casefold()
