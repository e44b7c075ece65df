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


SEARCH = 60.0
"""Seconds that the search for rows at fault may take, once it has begun on its last one."""


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
    not finite, or the time, rows are tried one by one to find those at fault, for `SEARCH` seconds: these, and those
    that were not come to, get the fallback. Raises UserError that names function and row where there is none.
    """
    name = getattr(function, "__name__", "the score function")
    together = _attempt(function, (prompts, responses, columns), timeout)
    if not isinstance(together, Failure):
        return Scores(together)
    values: list[float] = []
    failed: list[int] = []
    end = time.monotonic() + SEARCH
    for i, (prompt, response, row) in enumerate(zip(prompts, responses, columns, strict=True)):
        alone = _attempt(function, ([prompt], [response], [row]), timeout) if time.monotonic() < end else together
        if not isinstance(alone, Failure):
            values += alone
            continue
        if fallback is None:
            where = f"row {i} of the batch, prompt {prompt[-80:]!r}, response {response[:80]!r}"
            raise UserError(f"{name} {together}; {where}") from together.__cause__
        failed.append(i)
        values.append(fallback)
    if fallback is None:
        raise UserError(f"{name} {together}; though it scores each of them alone") from together.__cause__
    return Scores(values, tuple(failed))


Arguments = tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]


def _attempt(function: ScoreFunction, arguments: Arguments, timeout: float | None) -> list[float] | Failure:
    """The scores of a call, or why there are none.

    With a timeout the call is made in a thread. A thread cannot be stopped: one that hangs is left behind, and does not
    hold up the end of the program.
    """
    if timeout is None:
        return _scores(function, arguments)
    found: list[list[float] | Failure] = [Failure(f"took longer than {timeout:g} s")]
    thread = Thread(target=lambda: found.append(_scores(function, arguments)), daemon=True)
    thread.start()
    thread.join(timeout)
    return found[-1]


def _scores(function: ScoreFunction, arguments: Arguments) -> list[float] | Failure:
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
