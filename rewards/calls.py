"""Scores a batch by a function that may fail, and finds the responses that make it fail."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from policies.errors import UserError
from rewards.user_functions import Failure, ScoreFunction, score_once

log = logging.getLogger(__name__)

SEARCH_SECONDS = 60.0
"""After this time, the search for the responses that make a call fail starts no further call."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a score function.

    Attributes:
        prompts: Texts `[B]`.
        responses: Texts `[B]`.
        columns: The other columns of the prompts' rows `[B]`.
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    columns: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.responses)

    def part(self, rows: range) -> "Arguments":
        """The arguments of these responses, which are adjacent."""
        rows_of = slice(rows.start, rows.stop)
        return Arguments(self.prompts[rows_of], self.responses[rows_of], self.columns[rows_of])


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        values: `[B]`: scores, or what else the function returns for a response (see `FunctionSource.returns`).
        failed: The indices of the responses whose score is the fallback, because the call failed for them.
        reason: Why the first of them failed.
    """

    values: list[Any]
    failed: tuple[int, ...] = ()
    reason: str = ""


class Caller(Protocol):
    """Calls a score function, in this process or in others."""

    @property
    def parallel(self) -> int:
        """How many calls run at the same time."""
        ...

    def parts(self, batch: Arguments) -> list[range]:
        """Split a batch into the parts that have a call of their own."""
        ...

    def call(self, batches: Sequence[Arguments]) -> list[list[Any] | Failure]:
        """Call the function on each of these batches. Returns one value per response, or why there are none."""
        ...

    def close(self) -> None:
        """End the processes in which the function is called."""
        ...


@dataclass(frozen=True)
class InProcess:
    """Calls a function in this process, on whole batches."""

    function: ScoreFunction
    parallel: int = 1

    def parts(self, batch: Arguments) -> list[range]:
        return [range(len(batch))]

    def call(self, batches: Sequence[Arguments]) -> list[list[Any] | Failure]:
        return [score_once(self.function, batch.prompts, batch.responses, batch.columns) for batch in batches]

    def close(self) -> None:
        pass


def score_batch(caller: Caller, batch: Arguments, fallback: Any = None, name: str = "the function") -> Scores:
    """Score a batch by a function, which must return one finite number per response, or one list of spans.

    A call fails by an error, another result, the time limit, or the end of its
    process. Then its responses are scored one by one, for about `SEARCH_SECONDS`, to find those that fail. These get
    the fallback, and so do those that were not tried in time.

    Args:
        caller: Calls the function.
        batch: The arguments `[B]`.
        fallback: Value of a response for which the call fails; None: that is an error.
        name: The setting and the function, for messages.

    Raises:
        UserError: A call failed and there is no fallback; the message names the function and the response.
    """
    if not len(batch):
        return Scores([])
    parts = caller.parts(batch)
    search = _Search(caller, batch, fallback, name)
    values: list[Any] = []
    for rows, outcome in zip(parts, caller.call([batch.part(rows) for rows in parts]), strict=True):
        values += search.scores(rows, outcome) if isinstance(outcome, Failure) else outcome
    return Scores(values, tuple(search.failed), search.reason)


def call_function(
    function: ScoreFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    fallback: float | None = None,
) -> Scores:
    """Score a batch by a function in this process; see `score_batch`."""
    name = getattr(function, "__name__", "the score function")
    return score_batch(InProcess(function), Arguments(prompts, responses, columns), fallback, name)


class _Search:
    """Finds the responses that make a call fail, and collects them in `failed`."""

    def __init__(self, caller: Caller, batch: Arguments, fallback: Any, name: str) -> None:
        self.caller = caller
        self.batch = batch
        self.fallback = fallback
        self.name = name
        self.failed: list[int] = []
        self.reason = ""
        self._end = time.monotonic() + SEARCH_SECONDS

    def scores(self, rows: range, failure: Failure) -> list[Any]:
        """The values of responses for which a call has failed together."""
        if len(rows) == 1:
            return [self._fallback(rows.start, failure, failure)]
        values: list[Any] = []
        for start in range(rows.start, rows.stop, self.caller.parallel):
            together = range(start, min(start + self.caller.parallel, rows.stop))
            for row, outcome in zip(together, self._outcomes(together, failure), strict=True):
                values += [self._fallback(row, outcome, failure)] if isinstance(outcome, Failure) else outcome
        if self.fallback is None:
            raise UserError(f"{self.name} {failure}, though not for any of the responses alone") from failure.__cause__
        return values

    def _outcomes(self, rows: range, failure: Failure) -> list[list[Any] | Failure]:
        """The outcomes of these responses, each alone; those of their failed call where the time is over."""
        if time.monotonic() < self._end:
            return self.caller.call([self.batch.part(range(row, row + 1)) for row in rows])
        if self.fallback is None:
            raise UserError(
                f"{self.name} {failure}; which responses cause it was not found within {SEARCH_SECONDS:g} s"
            ) from failure.__cause__
        return [failure for _ in rows]

    def _fallback(self, row: int, outcome: Failure, failure: Failure) -> Any:
        """The fallback for a response that fails alone by `outcome`, after the failure of the call that it was in."""
        if self.fallback is None:
            prompt = self.batch.prompts[row][-80:]
            response = self.batch.responses[row][:80]
            where = f"response {row} of the batch, prompt {prompt!r}, response {response!r}"
            raise UserError(f"{self.name} {failure}; {where}") from failure.__cause__
        self.failed.append(row)
        self.reason = self.reason or str(outcome)
        return self.fallback
