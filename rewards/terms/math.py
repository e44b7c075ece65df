"""A math answer as a term."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from policies.errors import UserError
from rewards.children.source import FunctionSource
from rewards.terms.base import ChildSettings

if TYPE_CHECKING:
    from rewards.children.pool import FunctionPool


class MathTerm(ChildSettings):
    """1 where math-verify (`pip install 'align-rlhf[math]'`) finds the final expression of the response equal to the
    answer in `column`, else 0. It runs in a process of its own.
    """

    kind: Literal["math"]
    column: str = "answer"
    timeout: float | None = Field(
        10.0, gt=0, description="seconds after which a comparison fails and its process is killed; null: no limit"
    )
    processes: int = Field(1, ge=1, description="processes that share a batch")
    memory_gb: float | None = Field(
        4.0, gt=0, description="gigabytes that a process may allocate before it gets a MemoryError; null: no limit"
    )
    fallback: float | None = Field(
        0.0,
        description="score of a response whose comparison fails; such responses are counted. null: the run stops",
    )

    @property
    def columns(self) -> list[str]:
        """The column of the answer."""
        return [self.column]

    @property
    def is_verifiable(self) -> bool:
        """Yes."""
        return True

    def source(self, name: str) -> FunctionSource:
        """The comparison. Raises UserError where math-verify is not installed."""
        if find_spec("math_verify") is None:
            raise UserError("a reward of kind math needs math-verify: pip install 'align-rlhf[math]'")
        return FunctionSource(
            where="rewards.math_answers:compare_expressions",
            key=f"reward.terms.{name}",
            arguments={"column": self.column},
            memory_gb=self.memory_gb,
        )

    def make_pool(self, name: str) -> "FunctionPool":
        """The processes; every response has a time limit of its own, because any may hold an endless computation."""
        from rewards.children.pool import FunctionPool

        return FunctionPool(self.source(name), self.processes, self.timeout, one_by_one=True)
