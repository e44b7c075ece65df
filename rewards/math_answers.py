"""Compares mathematical expressions by math-verify; runs in a child process, which limits its time and memory."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off


def compare_expressions(
    prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]], column: str
) -> list[float]:
    """1 for each response whose final expression equals that of the answer, else 0.

    Raises:
        ValueError: An answer contains no expression.
    """
    scores: list[float] = []
    for response, row in zip(responses, columns, strict=True):
        answer = str(row[column])
        expected = parse(answer, parsing_timeout=None, raise_on_error=True)
        if not expected:
            raise ValueError(f"the column {column!r} contains no expression: {answer[:80]!r}")
        found = parse(response, parsing_timeout=None, raise_on_error=True)
        scores.append(float(verify(expected, found, timeout_seconds=None, raise_on_error=True)))
    return scores
