"""Scores of spans of a response, as the user's functions return them."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rewards.user_functions import Failure, shown_result


class Span(NamedTuple):
    """A score of part of a response's text.

    Attributes:
        start: The first of its characters, from 0.
        end: The character after its last one.
        score: Its score.
    """

    start: int
    end: int
    score: float


def read_spans(result: Any, responses: Sequence[str]) -> list[list[Span]] | Failure:
    """Check and convert what a function has returned: for each response a list of spans, which may be empty.

    Args:
        result: Anything. A span is a sequence (start, end, score), or a mapping with these keys.
        responses: Texts `[B]`.

    Returns:
        The spans of each response, or why the result is something else.
    """
    if not _is_list(result):
        return Failure(f"returned {shown_result(result)}; a list with one list of spans per response was expected")
    if len(result) != len(responses):
        return Failure(f"returned {len(result)} lists of spans for {len(responses)} responses")
    read: list[list[Span]] = []
    for values, response in zip(result, responses, strict=True):
        if not _is_list(values):
            return Failure(
                f"returned {shown_result(values)} for the response {response[:80]!r}; a list of spans was expected"
            )
        spans: list[Span] = []
        for value in values:
            span = _read_span(value, response)
            if isinstance(span, Failure):
                return span
            spans.append(span)
        read.append(spans)
    return read


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _read_span(value: Any, response: str) -> Span | Failure:
    place = f"returned the span {shown_result(value)} for the response {response[:80]!r}"
    try:
        start, end, score = (value["start"], value["end"], value["score"]) if isinstance(value, Mapping) else value
        span = Span(operator.index(start), operator.index(end), _number(score))
    except (KeyError, TypeError, ValueError, OverflowError):
        return Failure(f"{place}; (start, end, score) was expected: two integers and a number")
    if not 0 <= span.start < span.end <= len(response):
        return Failure(f"{place} of {len(response)} characters; 0 <= start < end <= {len(response)} was expected")
    if not math.isfinite(span.score):
        return Failure(f"{place}; a score must be finite")
    return span


def _number(score: Any) -> float:
    """A number as a float. Raises TypeError for text, which `float` would parse."""
    if isinstance(score, str | bytes | bytearray):
        raise TypeError
    return float(score)
