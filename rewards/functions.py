"""Scores by functions of the user's own."""

import asyncio
import importlib
import importlib.util
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from policies.errors import UserError

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]
"""Prompts, responses and the prompt rows' other columns, to one score each."""


def load_function(where: str, key: str) -> ScoreFunction:
    """The function that `FILE.py:function` or `module:function` names. Raises UserError naming the setting `key`."""
    place, _, name = where.rpartition(":")
    file = place.endswith(".py")
    if not name.isidentifier() or not (file or all(part.isidentifier() for part in place.split("."))):
        raise UserError(f"{key}: {where!r} is neither FILE.py:function nor module:function")
    module = _load_file(Path(place), key) if file else _load_module(place, key)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{key}: {place} has no function {name}")
    return function


@dataclass(frozen=True)
class Scores:
    """One score a response; failed: the rows whose score is the fallback, as the function gave none."""

    values: list[float]
    failed: tuple[int, ...] = ()


class Failure(Exception):
    """A function gave no score for a row, or not one for each; says why."""


def call_function(
    function: ScoreFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    timeout: float | None = None,
    fallback: float | None = None,
) -> Scores:
    """The function's scores: one finite number a response. It may be `async`.

    timeout: seconds that a call may take; unset: any. Where a call fails, by an error, a wrong count, a score that is
    not finite, or the time, each row is tried alone, to find those at fault: they get the fallback.
    Raises UserError that names function and row where there is none.
    """
    name = getattr(function, "__name__", "the score function")
    rows = [([p], [r], [c]) for p, r, c in zip(prompts, responses, columns, strict=True)]
    try:
        return Scores(_within(timeout, [(function, (prompts, responses, columns))])[0])
    except Failure as failure:
        reason = failure
    alone = _each(timeout, [(function, row) for row in rows])
    failed = tuple(i for i, result in enumerate(alone) if isinstance(result, Failure))
    if fallback is None:
        row = "though it scores each of them alone"
        if failed:
            i = failed[0]
            row = f"row {i} of the batch, prompt {prompts[i][-80:]!r}, response {responses[i][:80]!r}"
        raise UserError(f"{name} {reason}; {row}") from reason.__cause__
    values = [fallback if isinstance(result, Failure) else result[0] for result in alone]
    return Scores(values, failed)


Call = tuple[ScoreFunction, tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]]


def _within(timeout: float | None, calls: Sequence[Call]) -> list[list[float]]:
    """The scores of calls that all succeed."""
    for result in (results := _each(timeout, calls)):
        if isinstance(result, Failure):
            raise result
    return [result for result in results if not isinstance(result, Failure)]


def _each(timeout: float | None, calls: Sequence[Call]) -> list[list[float] | Failure]:
    """The scores of each call, or why there are none. With a timeout all run at once, each in a thread of its own.

    A thread cannot be stopped: one that hangs is left behind, and does not hold up the end of the program.
    """
    if timeout is None:
        return [_scores(function, arguments) for function, arguments in calls]
    found: list[list[float] | Failure] = [Failure(f"took longer than {timeout:g} s")] * len(calls)

    def run(i: int) -> None:
        found[i] = _scores(*calls[i])

    threads = [Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return found.copy()


def _scores(
    function: ScoreFunction, arguments: tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]
) -> list[float] | Failure:
    responses = arguments[1]
    try:
        given: Any = function(*arguments)
        if inspect.iscoroutine(given):
            given = asyncio.run(given)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        failure = Failure(f"raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})")
        failure.__cause__ = error
        return failure
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError):
        return Failure(f"gave {str(given)[:80]!r}; a list with one number a response was expected")
    if len(scores) != len(responses):
        return Failure(f"gave {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            return Failure(f"gave {score} for the response {response[:80]!r}; a score must be finite")
    return scores


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"align_user_{path.stem}", path)
    assert spec  # a path that ends in .py always has a loader
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{key}: {path} cannot be imported: {error}") from error
    return module


def _load_module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{key}: module {name} cannot be imported: {error}") from error
