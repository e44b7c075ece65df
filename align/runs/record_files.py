"""The files of a run's record, and the one place where they are read and checked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.errors import UserError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVENTS = "events.jsonl"

TEXTS = frozenset({"prompt", "response", "reference", "event", "time", "text"})
"""Keys of samples and of events whose values are texts."""
SAMPLE_SCORES = frozenset({"score", "gold"})
"""Keys of a sample whose values are numbers, or null for one that is not finite."""
LARGEST = 1e300
"""A larger number counts as not finite: differences and means of numbers up to here are finite."""
LARGEST_WHOLE = 2**53
"""Up to here, a float tells each whole number from the next."""
LONGEST_QUOTE = 60
"""Characters of a damaged value that an error quotes."""


def read_lines(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read a file of the record.

    Each line is an object with `stage`, a text, and `step`, a whole number. The other values of `metrics.jsonl` are
    numbers, histograms, or null for a number that is not finite. NaN, Infinity and numbers beyond `LARGEST` are read as
    null. `TEXTS` and `SAMPLE_SCORES` say what the values of samples and events are.

    Args:
        path: One of the three files, which may not exist.
        needs: Keys that each line must have besides.

    Returns:
        The rows, without a last line that was only partly written because the process was killed.

    Raises:
        UserError: The file cannot be read, or a line is damaged; the message names the file, the line and the key.
    """
    problem_of_values = _problem_of_metrics if path.name == METRICS else _problem_of_texts
    rows: list[dict[str, Any]] = []
    lines = _split(path)
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line, parse_constant=_not_finite, parse_float=_float, parse_int=_int)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise _damaged(path, number, str(error)) from None
        problem = _problem_of_line(row, needs) or problem_of_values(row)
        if problem:
            raise _damaged(path, number, problem)
        rows.append(row)
    return rows


def _split(path: Path) -> list[bytes]:
    """The lines of a file, without empty ones at its end."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _not_finite(_name: str) -> None:
    """What NaN and Infinity stand for, which are no JSON, but which many programs write."""


def _float(text: str) -> float | None:
    value = float(text)
    return value if abs(value) <= LARGEST else None


def _int(text: str) -> int | None:
    value = int(text)
    return value if abs(value) <= LARGEST else None


def _damaged(path: Path, number: int, problem: str) -> UserError:
    return UserError(f"{path}, line {number}: {problem}. Remove the line to continue without it")


def _problem_of_line(row: Any, needs: Sequence[str]) -> str | None:
    """What is wrong with a line of any of the files; None: nothing."""
    if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
        return "expected an object with `stage` and `step`"
    if not isinstance(row["stage"], str):
        return _unexpected(row, "stage", "a text")
    if row["step"] != -1 and not _is_whole(row["step"]):  # -1: an event before the first step
        return _unexpected(row, "step", "a whole number from 0 on")
    for key in needs:
        if key not in row:
            return f"it has no {key}"
    return None


def _problem_of_texts(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a sample or of an event."""
    for key in TEXTS & row.keys():
        if not isinstance(row[key], str):
            return _unexpected(row, key, "a text")
    for key in SAMPLE_SCORES & row.keys():
        if row[key] is not None and not _is_number(row[key]):
            return _unexpected(row, key, "a number or null")
    return None


def _problem_of_metrics(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the metrics of a line."""
    for name, value in row.items():
        if name not in ("stage", "step") and value is not None and not _is_number(value):
            if not isinstance(value, dict):
                return _unexpected(row, name, "a number, a histogram or null")
            if not _is_histogram(value):
                return _unexpected(row, name, "a histogram with `low`, a larger `high`, and `counts` of its bins")
    return None


def _unexpected(row: Mapping[str, Any], key: str, expected: str) -> str:
    value = json.dumps(row[key])
    if len(value) > LONGEST_QUOTE:
        value = value[:LONGEST_QUOTE] + "…"
    return f"{key} is {value}, expected {expected}"


def _is_number(value: Any) -> bool:
    """Whether a value is a number, which true and false are not."""
    return type(value) in (int, float)


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number that a float can hold exactly, from 0 on."""
    return type(value) is int and 0 <= value <= LARGEST_WHOLE


def _is_histogram(value: Mapping[str, Any]) -> bool:
    """Whether a value is a `Histogram`."""
    low: Any = value.get("low")
    high: Any = value.get("high")
    counts = value.get("counts")
    if not _is_number(low) or not _is_number(high) or high <= low:
        return False
    return isinstance(counts, list) and bool(counts) and all(map(_is_whole, counts))
