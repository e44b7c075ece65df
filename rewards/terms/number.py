"""The final number of the response, compared with a reference answer, as a term."""

import re
from typing import Literal

from pydantic import Field

from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import compare_with_column
from rewards.user_functions import ScoreFunction

NUMBER = re.compile(r"(?<![\d.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<!\d)[-+]?\.\d+")
"""A sign directly after a digit is a minus between two numbers."""
ANSWER_MARKS = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"),
    re.compile(r"(?:^|\s)A:\s*(.+)"),
)
"""Patterns that mark a final answer, the most reliable one first."""


class NumberTerm(TextTermSettings):
    r"""1 where the final number of the response is that of the answer in `column`, within `tolerance`, else 0: the
    number after the last `####`, else in the last `\boxed{}`, else after the last `A:`, else the last one.
    """

    kind: Literal["number"]
    column: str = "answer"
    tolerance: float = Field(1e-6, ge=0, description="largest difference of numbers that count as equal")

    @property
    def columns(self) -> list[str]:
        """The column of the answer."""
        return [self.column]

    @property
    def is_verifiable(self) -> bool:
        """Yes."""
        return True

    def make_function(self, name: str) -> ScoreFunction:
        """A function that compares the final numbers."""

        def agree(response: str, answer: str) -> bool:
            expected = final_number(answer)
            actual = final_number(response)
            if expected is None:
                raise ValueError(f"the column {self.column!r} contains no number: {answer[:80]!r}")
            return actual is not None and abs(actual - expected) <= self.tolerance

        return compare_with_column(self.column, agree)


def final_number(text: str) -> float | None:
    """The number that a text concludes with: the one after its last mark, else its last one; None without any."""
    for mark in ANSWER_MARKS:
        if answers := mark.findall(text):
            # A brace means a fraction or a root, not a plain number.
            numbers = [] if "{" in answers[-1] else NUMBER.findall(answers[-1])
            return _value(numbers[0]) if numbers else None
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))
