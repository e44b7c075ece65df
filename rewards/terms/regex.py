"""A regular expression as a term."""

import re
from typing import Literal

from pydantic import Field, field_validator

from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import score_each
from rewards.user_functions import ScoreFunction


class RegexTerm(TextTermSettings):
    """1 where the regular expression `pattern` occurs in the response (`full_match: true`: matches it all), else 0."""

    kind: Literal["regex"]
    pattern: str
    full_match: bool = Field(False, description="the pattern must match the whole response")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @property
    def is_verifiable(self) -> bool:
        """Yes."""
        return True

    def make_function(self, name: str) -> ScoreFunction:
        """A function that searches for, or matches, the pattern."""
        pattern = re.compile(self.pattern)
        find = pattern.fullmatch if self.full_match else pattern.search
        return score_each(lambda response: float(find(response) is not None))
