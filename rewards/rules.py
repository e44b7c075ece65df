"""Rewards by rule: each makes a score function of responses and their rows' columns."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonschema.validators import validator_for
from referencing import Registry

from policies.errors import UserError
from rewards.terms import ExactTerm, JsonTerm, MathTerm, NumberTerm, RegexTerm, RepetitionTerm
from rewards.user_functions import ScoreFunction

NUMBER = re.compile(r"(?<![\d.])[-+]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|(?<!\d)[-+]?\.\d+")
"""A sign behind a digit is a minus between two numbers."""
MARKS = (
    re.compile(r"####\s*(.+)"),
    re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"),
    re.compile(r"(?:^|\s)A:\s*(.+)"),
)
"""What stands before a final answer, the surest first."""


def regex(term: RegexTerm) -> ScoreFunction:
    """1 where the expression is found, else 0."""
    pattern = re.compile(term.pattern)
    found = pattern.fullmatch if term.full_match else pattern.search
    return lambda prompts, responses, columns: [float(found(response) is not None) for response in responses]


def exact(term: ExactTerm) -> ScoreFunction:
    """1 where the response is the answer, else 0."""
    return _against(term.column, lambda response, answer: _plain(response) == _plain(answer))


def number(term: NumberTerm) -> ScoreFunction:
    """1 where the final numbers agree, else 0."""

    def agree(response: str, answer: str) -> bool:
        right, given = final_number(answer), final_number(response)
        if right is None:
            raise ValueError(f"the column {term.column!r} holds no number: {answer[:80]!r}")
        return given is not None and abs(given - right) <= term.tolerance

    return _against(term.column, agree)


def math(term: MathTerm) -> ScoreFunction:
    """1 where math-verify finds the expressions equal, else 0. Raises UserError where it is not installed."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("a reward of kind math needs math-verify: pip install 'align-rlhf[math]'") from None

    def agree(response: str, answer: str) -> bool:
        return verify(parse(answer), parse(response))  # it gives up on each after seconds

    return _against(term.column, agree)


def repetition(term: RepetitionTerm) -> ScoreFunction:
    """Minus the share of runs of n words that came before."""

    def repeated(response: str) -> float:
        words = response.split()
        runs = [tuple(words[i : i + term.n]) for i in range(len(words) - term.n + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    return lambda prompts, responses, columns: [-repeated(response) for response in responses]


def json_rule(term: JsonTerm) -> ScoreFunction:
    """1 where the response is JSON of the schema, else 0."""
    given = term.schema_
    schema = json.loads(Path(given).read_text(encoding="utf-8")) if isinstance(given, str) else given
    # A registry of nothing: without one, what a $ref names is fetched, from wherever it is.
    validator = None if schema is None else validator_for(schema)(schema, registry=Registry())

    def holds(response: str) -> bool:
        try:
            value = json.loads(response)
        except (ValueError, RecursionError):
            return False
        return validator is None or validator.is_valid(value)

    return lambda prompts, responses, columns: [float(holds(response)) for response in responses]


def final_number(text: str) -> float | None:
    """The number that a text ends in: behind its last mark, else the last one there is."""
    for mark in MARKS:
        if marked := mark.findall(text):
            found = [] if "{" in marked[-1] else NUMBER.findall(marked[-1])  # a fraction, a root: no plain number
            return _value(found[0]) if found else None
    found = NUMBER.findall(text)
    return _value(found[-1]) if found else None


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _against(column: str, agrees: Callable[[str, str], bool]) -> ScoreFunction:
    """A rule that compares each response with a column of its row."""

    def score(prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Any]) -> list[float]:
        return [float(agrees(response, _answer(row, column))) for response, row in zip(responses, columns, strict=True)]

    score.__name__ = f"the rule on column {column!r}"
    return score


def _answer(row: Any, column: str) -> str:
    if column not in row:
        raise KeyError(f"prompt rows have no column {column!r}; they have {', '.join(row) or 'none'}")
    return str(row[column])
