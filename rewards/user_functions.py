"""Loads and calls the user's functions."""

import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from policies.errors import UserError

ScoreFunction = Callable[[Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]
"""From prompts, responses and the other columns of the prompts' rows to one score per response; may be `async`."""
OUR_FOLDER = str(Path(__file__).resolve().parents[1])
"""The folder of our packages. An editable install has none on the path, and folders on it would come first."""
SCORE_ARGUMENTS = ("prompts", "responses", "columns")
"""The names of a score function's arguments."""


def load_function(where: str, key: str) -> ScoreFunction:
    """Load one of the user's functions.

    The folder of a file becomes the last one on the path, so that the file can import what is beside it. What is
    installed takes precedence there, because this process may import it later.

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


def check_parameters(
    function: Callable[..., Any], arguments: Sequence[str], where: str, key: str, keywords: Collection[str] = ()
) -> None:
    """Check that a function can be called with these arguments. What has no signature, as some built-ins, passes.

    Args:
        function: The function that `load_function` returned.
        arguments: The names of its positional arguments in the documentation.
        where: `FILE.py:function` or `module:function`, for messages.
        key: The setting that names it, for messages.
        keywords: The names of further arguments, which are passed by name.

    Raises:
        UserError: It takes others.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        name = where.rpartition(":")[2]
        code = getattr(inspect.unwrap(function), "__code__", None)
        place = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        call = ", ".join(arguments)
        raise UserError(f"{key}: {where} must take ({call}), and it is {name}{signature}: {error}{place}") from None


def describe_exception(function: Callable[..., Any], error: BaseException) -> str:
    """`raised TYPE: MESSAGE (FILE:LINE)`, the line being the last one of the traceback in the function's file.

    Where the function was not entered, because its signature is wrong, it is the line of its definition.
    """
    if isinstance(error, MemoryError):
        traceback.clear_frames(error.__traceback__)  # frees what the function has allocated so far
    entries = traceback.extract_tb(error.__traceback__)
    place = f"{entries[-1].filename}:{entries[-1].lineno}"
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is not None:
        lines = [entry.lineno for entry in entries if entry.filename == code.co_filename]
        place = f"{code.co_filename}:{lines[-1] if lines else code.co_firstlineno}"
    message = f": {error}" if str(error) else ""
    return f"raised {type(error).__name__}{message} ({place})"


class Failure(Exception):
    """A call did not return one finite score, or one list of spans, per response; the message says why."""


ResultReader = Callable[[Any, Sequence[str]], list[Any] | Failure]
"""From what a function has returned for responses `[B]` to one value per response, or why there are none."""


def score_once(
    function: ScoreFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    read: ResultReader | None = None,
) -> list[Any] | Failure:
    """Call a function on a batch.

    Args:
        function: The function; it may be `async`.
        prompts: Texts `[B]`.
        responses: Texts `[B]`.
        columns: The other columns of the prompts' rows `[B]`.
        read: Checks and converts the result; None: `read_scores`.

    Returns:
        One value per response, by default a finite score, or why there are none.
    """
    try:
        result: Any = function(prompts, responses, columns)
        if inspect.iscoroutine(result):
            import asyncio  # slow to import

            result = asyncio.run(result)
        return (read or read_scores)(result, responses)
    except (Exception, SystemExit) as error:
        failure = Failure(describe_exception(function, error))
        failure.__cause__ = error
        return failure


def read_scores(result: Any, responses: Sequence[str]) -> list[float] | Failure:
    """One finite score per response, or why the result is something else."""
    scores = to_scores(result)
    if scores is None:
        return Failure(f"returned {shown_result(result)}; a list with one number per response was expected")
    if len(scores) != len(responses):
        return Failure(f"returned {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            return Failure(f"returned {score} for the response {response[:80]!r}; a score must be finite")
    return scores


def to_scores(result: Any) -> list[float] | None:
    """The numbers of a list, a tuple, another ordered series, a NumPy array or a tensor, each of one dimension.

    Returns:
        The numbers; None for anything else, such as text, whose characters are no scores, or a set, which has no order.
    """
    if isinstance(result, str | bytes | bytearray | memoryview | Mapping | Set):
        return None
    if hasattr(result, "tolist"):  # NumPy arrays and torch tensors, without importing either
        result = result.tolist()
    try:
        numbers = list(result)
    except TypeError:
        return None
    scores: list[float] = []
    for number in numbers:
        if getattr(number, "ndim", 0) or isinstance(number, str | bytes | bytearray):
            return None
        try:
            scores.append(float(number))
        except (TypeError, ValueError, OverflowError):
            return None
    return scores


def shown_result(result: Any) -> str:
    """What a function has returned, on one short line."""
    shape = getattr(result, "shape", ())
    if len(shape) == 1:
        return repr(result)[:80]
    of_shape = f" of shape {list(shape)}" if shape else ""
    return f"{' '.join(repr(result).split())[:80]}{of_shape}"


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"align_user_{path.stem}", path)
    assert spec  # a path that ends with .py always has a loader
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    for folder in (OUR_FOLDER, str(path.resolve().parent)):
        if folder not in sys.path:
            sys.path.append(folder)
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
