"""One of the user's functions as a term."""

from typing import Literal

from pydantic import Field

from rewards.children.source import FunctionSource
from rewards.terms.base import ChildSettings


class UserFunctionSettings(ChildSettings):
    """The settings of terms that call a function of the user's."""

    function: str = Field(description="FILE.py:function or module:function")

    def source(self, name: str) -> FunctionSource:
        """The user's function."""
        return FunctionSource(self.function, f"reward.terms.{name}.function", memory_gb=self.memory_gb)


class FunctionTerm(UserFunctionSettings):
    """Score by a function of your own, `FILE.py:function` or `module:function`: it takes prompts, responses and the
    rows' other columns and returns one number per response; it may be `async`. It runs in a process of its own.
    """

    kind: Literal["function"]
    verifiable: bool = Field(
        False,
        description="the function returns 1 for a right response and 0 for a wrong one: an evaluation reports its "
        "accuracy and pass@k",
    )

    @property
    def is_verifiable(self) -> bool:
        """Where the user says so."""
        return self.verifiable
