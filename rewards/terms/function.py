"""A function of the user's own as a term."""

from typing import Literal

from pydantic import Field

from rewards.terms.base import CallSettings
from rewards.user_functions import ScoreFunction, load_function


class FunctionTerm(CallSettings):
    """Score by a function of your own, `FILE.py:function` or `module:function`: it takes prompts, responses and the
    rows' other columns and returns one number per response; it may be `async`.
    """

    kind: Literal["function"]
    function: str = Field(description="FILE.py:function or module:function")

    def make_function(self, name: str) -> ScoreFunction:
        """Import the function. Raises UserError where it does not exist."""
        return load_function(self.function, f"reward.terms.{name}.function")
