"""Loads and calls the user's score functions."""

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
"""From prompts, responses and the other columns of the prompts' rows to one score per response; may be `async`."""


def load_function(where: str, key: str) -> ScoreFunction:
    """Load one of the user's functions.

    Args:
        where: `FILE.py:function` or `module:function`.
        key: The setting that names it, for messages.

    Raises:
        UserError: The file, module or function does not exist, or cannot be imported.
    """
    source, _, name = where.rpartition(":")
    is_file = source.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in source.split("."))):
        raise UserError(f"{key}: {where!r} is neither FILE.py:function nor module:function")
    module = _load_file(Path(source), key) if is_file else _load_module(source, key)
    if not hasattr(module, name):
        raise UserError(f"{key}: {source} has no function {name}")
    function: ScoreFunction = getattr(module, name)
    if not callable(function):
        raise UserError(f"{key}: {name} in {source} is not a function")
    return function


def describe_exception(function: Callable[..., Any], error: Exception) -> str:
    """`raised TYPE: MESSAGE (FILE:LINE)`, the line being the last one of the traceback in the function's file.

    Where the function was not entered, because its signature is wrong, it is the line of its definition.
    """
    entries = traceback.extract_tb(error.__traceback__)
    place = f"{entries[-1].filename}:{entries[-1].lineno}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None:
        lines = [entry.lineno for entry in entries if entry.filename == code.co_filename]
        place = f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"
    return f"raised {type(error).__name__}: {error} ({place})"


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        values: `[B]`.
        failed: The indices of the responses whose score is the fallback, because the call failed for them.
    """

    values: list[float]
    failed: tuple[int, ...] = ()


SEARCH_SECONDS = 60.0
"""After this time, the search for the responses that make a call fail starts no further call."""


class Failure(Exception):
    """A call did not return one finite score per response; the message says why."""


def call_function(
    function: ScoreFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    timeout: float | None = None,
    fallback: float | None = None,
    key: str = "",
) -> Scores:
    """Score a batch by a function, which must return one finite number per response.

    A call fails by an error, a wrong number of scores, a score that is not finite, or the timeout. Then the responses
    are scored one by one, for about `SEARCH_SECONDS`, to find those that fail. These get the fallback, and so do those
    that were not tried in time.

    Args:
        function: The user's function; it may be `async`.
        prompts: Texts `[B]`.
        responses: Texts `[B]`.
        columns: The other columns of the prompts' rows `[B]`.
        timeout: Seconds that one call may take; None: no limit.
        fallback: Score of a response for which the call fails; None: that is an error.
        key: The setting that names the function, for messages; empty: it is not known.

    Raises:
        UserError: A call failed and there is no fallback; the message names the function and the response.
    """
    name = getattr(function, "__name__", "the score function")
    if key:
        name = f"{key}: {name}"
    scores = _attempt(function, (prompts, responses, columns), timeout)
    if not isinstance(scores, Failure):
        return Scores(scores)
    failure = scores
    values: list[float] = []
    failed: list[int] = []
    end = time.monotonic() + SEARCH_SECONDS
    for i, (prompt, response, row) in enumerate(zip(prompts, responses, columns, strict=True)):
        in_time = time.monotonic() < end
        single = _attempt(function, ([prompt], [response], [row]), timeout) if in_time else failure
        if not isinstance(single, Failure):
            values += single
            continue
        if fallback is None:
            where = f"response {i} of the batch, prompt {prompt[-80:]!r}, response {response[:80]!r}"
            raise UserError(f"{name} {failure}; {where}") from failure.__cause__
        failed.append(i)
        values.append(fallback)
    if fallback is None:
        raise UserError(f"{name} {failure}, though not for any of the responses alone") from failure.__cause__
    return Scores(values, tuple(failed))


Arguments = tuple[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]]


def _attempt(function: ScoreFunction, arguments: Arguments, timeout: float | None) -> list[float] | Failure:
    """The scores of a call, or why it failed.

    With a timeout the call runs in a thread. A thread cannot be stopped: one that hangs is abandoned, and does not
    delay the end of the program.
    """
    if timeout is None:
        return _scores(function, arguments)
    outcomes: list[list[float] | Failure] = [Failure(f"took longer than {timeout:g} s")]
    thread = Thread(target=lambda: outcomes.append(_scores(function, arguments)), daemon=True)
    thread.start()
    thread.join(timeout)
    return outcomes[-1]


def _scores(function: ScoreFunction, arguments: Arguments) -> list[float] | Failure:
    responses = arguments[1]
    try:
        result: Any = function(*arguments)
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
    except Exception as error:
        failure = Failure(describe_exception(function, error))
        failure.__cause__ = error
        return failure
    try:
        scores = [float(score) for score in result]
    except (TypeError, ValueError):
        return Failure(f"returned {repr(result)[:80]}; a list with one number per response was expected")
    if len(scores) != len(responses):
        return Failure(f"returned {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            return Failure(f"returned {score} for the response {response[:80]!r}; a score must be finite")
    return scores


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"align_user_{path.stem}", path)
    assert spec  # a path that ends with .py always has a loader
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: {path} cannot be imported: {_import_problem(error)}") from error
    return module


def _load_module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: module {name} cannot be imported: {_import_problem(error)}") from error


def _import_problem(error: BaseException) -> str:
    """`TYPE: MESSAGE (FILE:LINE)`, the line being the last one of the traceback in the user's file."""
    entries = traceback.extract_tb(error.__traceback__)
    in_user_files = [entry for entry in entries if entry.filename != __file__ and "importlib" not in entry.filename]
    if in_user_files:
        lines = [entry.lineno for entry in entries if entry.filename == in_user_files[0].filename]
        return f"{type(error).__name__}: {error} ({in_user_files[0].filename}:{lines[-1]})"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    return str(error)  # the module does not exist
