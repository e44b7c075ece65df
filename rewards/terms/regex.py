"""A regular expression as a term."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from rewards.terms.base import TextTermSettings
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

    def make_function(self, name: str) -> ScoreFunction:
        """1 where the pattern is found or matches, else 0."""
        pattern = re.compile(self.pattern)
        find = pattern.fullmatch if self.full_match else pattern.search

        def score(
            prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
        ) -> list[float]:
            return [float(find(response) is not None) for response in responses]

        return score
