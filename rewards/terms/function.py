"""One of the user's functions as a term."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from rewards.terms.base import CallSettings, FunctionScorer, RewardStage
from rewards.user_functions import ScoreFunction, load_function


class FunctionTerm(CallSettings):
    """Score by a function of your own, `FILE.py:function` or `module:function`: it takes prompts, responses and the
    rows' other columns and returns one number per response; it may be `async`.
    """

    kind: Literal["function"]
    function: str = Field(description="FILE.py:function or module:function")

    def make_function(self, name: str) -> ScoreFunction:
        """Import the function. Raises UserError where it does not exist."""
        return load_function(self.function, _key(name))

    def make_scorer(self, name: str, stage: RewardStage) -> FunctionScorer:
        """A scorer by the function, which names the setting in its messages."""
        return replace(super().make_scorer(name, stage), key=_key(name))


def _key(name: str) -> str:
    """The setting that names the function of a term."""
    return f"reward.terms.{name}.function"
