"""Scores by functions of the user's own."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def call_function(
    function: ScoreFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
) -> list[float]:
    """The function's scores. Raises UserError unless they are one finite number a response."""
    name = getattr(function, "__name__", "the score function")
    given = function(prompts, responses, columns)
    try:
        scores = [float(score) for score in given]
    except (TypeError, ValueError):
        raise UserError(f"{name} gave {str(given)[:80]!r}; a list with one number a response was expected") from None
    if len(scores) != len(responses):
        raise UserError(f"{name} gave {len(scores)} scores for {len(responses)} responses")
    for score, response in zip(scores, responses, strict=True):
        if not math.isfinite(score):
            raise UserError(f"{name} gave {score} for the response {response[:80]!r}; a score must be finite")
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
