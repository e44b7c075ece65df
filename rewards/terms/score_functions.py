"""Score functions made of a function of one response."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.user_functions import ScoreFunction


def score_each(score_one: Callable[[str], float]) -> ScoreFunction:
    """A score function that depends on the responses alone."""

    def score(prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[float]:
        return [score_one(response) for response in responses]

    return score


def compare_with_column(column: str, agree: Callable[[str, str], bool]) -> ScoreFunction:
    """A score function: 1 where `agree(response, reference)` holds, else 0; the reference is the column's text."""

    def score(prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[float]:
        scores: list[float] = []
        for response, row in zip(responses, columns, strict=True):
            scores.append(float(agree(response, _reference(row, column))))
        return scores

    score.__name__ = f"the rule on column {column!r}"
    return score


def _reference(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise KeyError(f"prompt rows have no column {column!r}; they have {', '.join(row) or 'none'}")
    return str(row[column])
