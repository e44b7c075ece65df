"""A math answer as a term."""

from typing import Literal

from policies.errors import UserError
from rewards.terms.base import TextTermSettings
from rewards.terms.score_functions import compare_with_column
from rewards.user_functions import ScoreFunction


class MathTerm(TextTermSettings):
    """1 where math-verify (`pip install 'align-rlhf[math]'`) finds the final expression of the response equal to the
    answer in `column`, else 0.
    """

    kind: Literal["math"]
    column: str = "answer"

    @property
    def columns(self) -> list[str]:
        """The column of the answer."""
        return [self.column]

    def make_function(self, name: str) -> ScoreFunction:
        """A function that compares expressions. Raises UserError where math-verify is not installed."""
        try:
            from math_verify import parse, verify
        except ImportError:
            raise UserError("a reward of kind math needs math-verify: pip install 'align-rlhf[math]'") from None

        def agree(response: str, answer: str) -> bool:
            return bool(verify(parse(answer), parse(response)))  # each has a timeout of its own

        return compare_with_column(self.column, agree)
