"""The kinds of term: their settings, their scores, and their registry."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from policies.errors import UserError
from rewards.schema import RewardSettings
from rewards.terms.base import RewardStage, TermInput, TermScores, TermSettings
from rewards.terms.number import final_number
from rewards.terms.registry import TERMS, Term, terms_table
from tests.outside_data import outside_data

ROOT = Path(__file__).parents[2]


def make_term(**settings: Any) -> TermSettings:
    term: TermSettings = TypeAdapter(Term).validate_python(settings)
    return term


def score(term: TermSettings, reward: RewardSettings | None = None, **batch: Any) -> TermScores:
    """Scores of a batch of which the test says only what matters to it."""
    scorer = term.make_scorer("mine", RewardStage(reward or RewardSettings(), {}))
    return scorer(
        TermInput(
            prompts=batch.get("prompts", ["p"]),
            decode_responses=lambda: batch.get("responses", ["r"]),
            columns=batch.get("columns", [{}]),
            response_lengths=batch.get("response_lengths", [1]),
            reward_outputs=batch.get("reward_outputs"),
        )
    )


def scores(responses: list[str], columns: dict[str, Any] | None = None, **settings: Any) -> list[float]:
    count = len(responses)
    result = score(make_term(**settings), prompts=["p"] * count, responses=responses, columns=[columns or {}] * count)
    assert result.values.dtype == torch.float64
    assert not result.notes
    return result.values.tolist()


def test_a_regular_expression_is_found_anywhere_or_matches_the_whole_response() -> None:
    assert scores(["a1b", "1", "ab"], kind="regex", pattern=r"\d") == [1.0, 1.0, 0.0]
    assert scores(["a1b", "1", "ab"], kind="regex", pattern=r"\d", full_match=True) == [0.0, 1.0, 0.0]


def test_the_exact_answer_up_to_white_space_and_case() -> None:
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
def test_the_final_number_of_a_text(text: str, number: float | None) -> None:
    assert final_number(text) == number


def test_numbers_agree_within_a_tolerance() -> None:
    columns = {"truth": "#### 10"}
    assert scores(["#### 10.0", "11", "none"], columns, kind="number", column="truth") == [1.0, 0.0, 0.0]
    assert scores(["#### 10.4"], columns, kind="number", column="truth", tolerance=0.5) == [1.0]


def test_real_solutions_are_right_where_their_authors_say_so() -> None:
    solutions = outside_data("gsm8k/solutions.jsonl")
    rows = [json.loads(line) for line in solutions.read_text(encoding="utf-8").splitlines()]
    agreed: list[bool] = []
    for row in rows:
        for solution in row.values():
            if isinstance(solution, dict):
                (result,) = scores([solution["solution"]], {"answer": row["ground_truth"]}, kind="number")
                agreed.append(result == float(solution["is_correct"]))
    assert sum(agreed) / len(agreed) > 0.99


def test_equal_expressions_score_1() -> None:
    values, failed = math_scores(
        [r"it is $0.5$", r"$\frac{2}{4}$", r"$\frac{1}{3}$", "none", r"$x > \{1, 2\}$", r"\boxed{("]
    )
    assert values == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert not any(failed)


def test_expressions_that_take_too_long_or_too_much_memory_get_the_fallback_and_are_counted() -> None:
    responses = [r"$\frac{1}{2}$", r"$10^{10^{10}}$", r"$0.5$"]
    assert math_scores(responses, timeout=2) == ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    assert math_scores(responses, timeout=2, fallback=-1, processes=2) == ([1.0, -1.0, 1.0], [0.0, 1.0, 0.0])
    with pytest.raises(UserError, match=r"^reward\.terms\.mine: .* took longer than 2 s; response 1 of the batch"):
        math_scores(responses, timeout=2, fallback=None)


def test_an_answer_without_an_expression_is_counted_as_a_failure() -> None:
    assert math_scores(["$1$"], {"answer": ""}) == ([0.0], [1.0])


def math_scores(
    responses: list[str], columns: dict[str, Any] | None = None, **settings: Any
) -> tuple[list[float], list[float]]:
    """The scores of a term of kind math, where the answer is ½, and which of them failed."""
    count = len(responses)
    rows = [columns or {"answer": r"$\frac{1}{2}$"}] * count
    result = score(make_term(kind="math", **settings), prompts=["p"] * count, responses=responses, columns=rows)
    return result.values.tolist(), result.notes.get("failed/mine", torch.zeros(count)).tolist()


def test_repetition_is_the_share_of_ngrams_that_occurred_before() -> None:
    assert scores(["a b c d", "a b a b a b", "a"], kind="repetition", n=2) == [0.0, -0.6, 0.0]


def test_json_is_checked_against_a_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    responses = ['{"name": "x"}', '{"name": 1}', "[]", "{", "[" * 100_000]
    assert scores(responses, kind="json", schema=schema) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores(responses, kind="json") == [1.0, 1.0, 1.0, 0.0, 0.0]
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    assert scores(responses, kind="json", schema=str(tmp_path / "schema.json")) == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kind": "regex", "pattern": "("}, "not a regular expression"),
        ({"kind": "json", "schema": {"type": "thing"}}, "not a JSON schema"),
        ({"kind": "json", "schema": "nowhere.json"}, "cannot be read"),
        ({"kind": "length", "max_tokens": 3, "window": 4}, "window 4 is longer than max_tokens, 3"),
        ({"kind": "exact", "clip": [1, 0]}, r"\[min, max\]"),
        ({"kind": "judge", "url": "localhost", "model": "m"}, "http:// or https://"),
        ({"kind": "judge", "url": "http://h", "model": "m", "instruction": "grade!"}, "no {response}"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        make_term(**settings)


@pytest.mark.parametrize("kind", ["exact", "number", "math"])
def test_a_missing_column_is_named(kind: str) -> None:
    with pytest.raises(UserError, match="no column 'answer'; they have other"):
        scores(["1"], {"other": "1"}, kind=kind)


def test_length_falls_to_minus_one_over_its_window() -> None:
    lengths = [3, 6, 8, 10, 15]
    falling = score(make_term(kind="length", max_tokens=10, window=4), response_lengths=lengths)
    assert falling.values.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    step = score(make_term(kind="length", max_tokens=8), response_lengths=lengths)
    assert step.values.tolist() == [0.0, 0.0, 0.0, -1.0, -1.0]


def test_the_model_combines_its_members_and_notes_attributes_and_spread() -> None:
    reward = RewardSettings.model_validate(
        {"attributes": {"kind": 0.5, "brief": 0.5}, "ensemble": {"members": 2, "combine": "minimum"}}
    )
    outputs = torch.tensor([[1.0, 2.0, 3.0, 5.0, 6.0, 7.0]])  # overall, kind and brief of each of two members
    result = score(make_term(kind="model"), reward, reward_outputs=outputs)
    assert result.values.tolist() == [1.0]
    notes = {name: values.tolist() for name, values in result.notes.items()}
    assert notes == {"attribute/kind": [4.0], "attribute/brief": [5.0], "spread": [2.0]}


def test_a_fallback_is_noted_under_the_name_of_the_term(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text("def f(p, r, c): return [1.0 / len(x) for x in r]\n")
    term = make_term(kind="function", function=f"{tmp_path}/score.py:f", fallback=-1.0)
    result = score(term, prompts=["p", "q"], responses=["ab", ""], columns=[{}, {}])
    assert result.values.tolist() == [0.5, -1.0]
    assert {name: values.tolist() for name, values in result.notes.items()} == {"failed/mine": [0.0, 1.0]}


def test_responses_are_decoded_once_and_only_where_a_term_reads_them() -> None:
    decoded: list[int] = []

    def decode() -> list[str]:
        decoded.append(1)
        return ["r"]

    batch = TermInput(prompts=["p"], decode_responses=decode, columns=[{}], response_lengths=[1])
    stage = RewardStage(RewardSettings(), {})
    make_term(kind="length", max_tokens=8).make_scorer("short", stage)(batch)
    assert decoded == []
    for name in ("one", "two"):
        make_term(kind="regex", pattern="r").make_scorer(name, stage)(batch)
    assert decoded == [1]


@pytest.mark.parametrize(
    ("settings", "columns"),
    [
        ({"kind": "number", "column": "truth"}, ["truth"]),
        ({"kind": "regex", "pattern": "x"}, []),
        ({"kind": "judge", "url": "http://h", "model": "m", "instruction": "{prompt} {response} {answer}"}, ["answer"]),
    ],
)
def test_the_columns_that_a_term_reads(settings: dict[str, Any], columns: list[str]) -> None:
    assert make_term(**settings).columns == columns


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"kind": "function", "function": "nowhere.py:f"},
            r"reward\.terms\.mine\.function: file nowhere.py does not exist",
        ),
        ({"kind": "classifier", "path": "/nowhere/model"}, "/nowhere/model does not exist"),
        ({"kind": "endpoint", "url": "http://h", "key_env": "NOT_SET_HERE"}, "NOT_SET_HERE is not set"),
    ],
)
def test_what_a_term_names_and_does_not_exist_is_refused_before_a_run(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_term(**settings).check("mine")


def test_each_kind_is_in_the_table_of_the_documentation() -> None:
    assert terms_table() in (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert {"model", "classifier", "function", "regex", "exact", "number", "math"} < TERMS.keys()


def test_settings_are_loaded_without_heavy_libraries() -> None:
    heavy = ("torch", "transformers", "requests", "jsonschema")
    program = f"import sys, rewards.schema; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


VOWELS = '''"""Vowels as a term."""

from typing import Literal

from rewards.terms.base import TextTermSettings
from rewards.user_functions import ScoreFunction


class VowelsTerm(TextTermSettings):
    """Number of vowels in the response."""

    kind: Literal["vowels"]

    def make_function(self, name: str) -> ScoreFunction:
        return lambda prompts, responses, columns: [sum(map(r.count, "aeiou")) for r in responses]
'''
USE_VOWELS = """
from align.config.schema import Experiment
from rewards.terms import base, registry

experiment = Experiment.model_validate(
    {"name": "x", "model": {"path": "m"}, "reward": {"terms": {"mine": {"kind": "vowels", "weight": 2.0}}}}
)
term = experiment.reward.terms["mine"]
batch = base.TermInput(["p", "p"], lambda: ["banana", "xyz"], [{}, {}], [1, 1])
scorer = term.make_scorer("mine", base.RewardStage(experiment.reward, {}))
assert "| `vowels` | Number of vowels in the response |" in registry.terms_table()
print(registry.__file__, term.weight, scorer(batch).values.tolist())
"""


def test_a_term_is_added_as_one_file(tmp_path: Path) -> None:
    for package in ("align", "policies", "rewards", "rollouts"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "rewards" / "terms" / "vowels.py").write_text(VOWELS)
    result = subprocess.run(
        [sys.executable, "-c", USE_VOWELS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split(maxsplit=1) == [f"{tmp_path}/rewards/terms/registry.py", "2.0 [3.0, 0.0]\n"], (
        result.stderr
    )
