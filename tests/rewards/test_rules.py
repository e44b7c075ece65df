import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from align.scoring.build import build_function
from rewards.rules import final_number
from rewards.terms import Term
from rewards.user_functions import ScoreFunction

SOLUTIONS = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "solutions.jsonl"


def rule(**settings: Any) -> ScoreFunction:
    return build_function("rule", TypeAdapter(Term).validate_python(settings))


def scores(responses: list[str], columns: dict[str, Any] | None = None, **settings: Any) -> list[float]:
    return list(rule(**settings)(["p"] * len(responses), responses, [columns or {}] * len(responses)))


def test_a_regular_expression_is_found_anywhere_or_matches_as_a_whole() -> None:
    assert scores(["a1b", "1", "ab"], kind="regex", pattern=r"\d") == [1.0, 1.0, 0.0]
    assert scores(["a1b", "1", "ab"], kind="regex", pattern=r"\d", whole=True) == [0.0, 1.0, 0.0]


def test_an_exact_answer_but_for_white_space_and_case() -> None:
    assert scores([" new  york\n", "New York City"], {"answer": "New York"}, kind="exact") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It takes 2 and 3.\n#### 5", 5),
        ("#### 1,234,567", 1234567),
        ("#### $18.50 in all", 18.5),
        ("#### -3", -3),
        (r"so \boxed{42} it is, of 7", 42),
        (r"#### 3, in a box", 3),
        (r"\boxed{\frac{1}{2}}", None),
        ("5-3", 3),
        ("3,4", 4),
        ("#### 1\nno, #### 2", 2),
        ("We get 12 of 15\nA: 3", 3),
        ("the answer is 7, I think", 7),
        ("1 then 2 then .5", 0.5),
        ("1e3", 1000),
        ("none", None),
        ("5 of them\n#### none", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_numbers_agree_within_a_tolerance() -> None:
    columns = {"truth": "#### 10"}
    assert scores(["#### 10.0", "11", "none"], columns, kind="number", column="truth") == [1.0, 0.0, 0.0]
    assert scores(["#### 10.4"], columns, kind="number", column="truth", tolerance=0.5) == [1.0]


@pytest.mark.skipif(not SOLUTIONS.is_file(), reason="shared/data is not here")
def test_real_solutions_are_right_where_their_authors_say_so() -> None:
    rows = [json.loads(line) for line in SOLUTIONS.read_text(encoding="utf-8").splitlines()]
    judged = [
        (float(said["is_correct"]), scores([said["solution"]], {"answer": row["ground_truth"]}, kind="number")[0])
        for row in rows
        for said in row.values()
        if isinstance(said, dict)
    ]
    assert sum(said == found for said, found in judged) / len(judged) > 0.99


def test_expressions_that_are_equal() -> None:
    columns = {"answer": r"$\frac{1}{2}$"}
    assert scores([r"it is $0.5$", r"$\frac{2}{4}$", r"$\frac{1}{3}$"], columns, kind="math") == [1.0, 1.0, 0.0]


def test_repetition_is_the_share_of_runs_that_came_before() -> None:
    assert scores(["a b c d", "a b a b a b", "a"], kind="repetition", n=2) == [0.0, -0.6, 0.0]


def test_json_as_a_schema_says(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    responses = ['{"name": "x"}', '{"name": 1}', "[]", "{", "[" * 100_000]
    assert scores(responses, kind="json", schema=schema) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(responses, kind="json") == [1.0, 1.0, 1.0, 0.0, 0.0]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert scores(responses, kind="json", schema=str(tmp_path / "schema.json")) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "json", "schema": {"type": "thing"}}, "no JSON schema"),
        ({"kind": "json", "schema": "nowhere.json"}, "cannot be read"),
        ({"kind": "length", "max_tokens": 3, "window": 4}, "window 4 is longer than max_tokens, 3"),
        ({"kind": "exact", "clip": [1, 0]}, r"\[min, max\]"),
        ({"kind": "judge", "url": "localhost", "model": "m"}, "http:// or https://"),
        ({"kind": "judge", "url": "http://h", "model": "m", "instruction": "grade!"}, "no {response}"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        rule(**settings)


@pytest.mark.parametrize("kind", ["exact", "number", "math"])
def test_a_missing_column_is_named(kind: str) -> None:
    with pytest.raises(KeyError, match="no column 'answer'; they have other"):
        scores(["1"], {"other": "1"}, kind=kind)
