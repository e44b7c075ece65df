"""Rows of ShareGPT, Alpaca, UltraFeedback and of data sets with labels of steps are read as align's own."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.schema import SourceSettings
from align.data.forms import FORMS, DataKind, form_of_row, forms_table, in_align_columns, read_source_rows
from align.data.parsing import parse_demonstration, parse_prompt
from align.data.source_row import SourceRow
from policies.errors import UserError
from rewards.preferences import Pair, Ranking, Rating, parse_preference
from rewards.step_labels import LabelledSteps, parse_steps
from tests.documents import ROOT

ASKED = {"role": "user", "content": "Name a colour."}
REPLY = {"role": "assistant", "content": "Blue."}
SHAREGPT = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
ALPACA = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
COMPLETIONS = [
    {"response": "Blue.", "overall_score": 7.5},
    {"response": "Cow.", "overall_score": 2},
    {"response": "Red.", "overall_score": "7.5"},
]


def converted(values: dict[str, Any], kind: DataKind, form: str | None = None) -> list[SourceRow]:
    named = next((each for each in FORMS if each.kind == kind and each.name == form), None)
    return in_align_columns(SourceRow("file:1", values), kind, named)


def one(values: dict[str, Any], kind: DataKind) -> dict[str, Any]:
    (row,) = converted(values, kind)
    assert row.problem is None
    return row.values


def problem(values: dict[str, Any], kind: DataKind) -> str:
    (row,) = converted(values, kind)
    assert row.problem is not None
    return row.problem


def test_a_sharegpt_conversation_is_a_demonstration() -> None:
    row = one({"conversations": SHAREGPT, "system": "Be brief.", "id": 3}, "demonstrations")
    assert row == {"messages": [{"role": "system", "content": "Be brief."}, ASKED, REPLY], "id": 3}
    parse_demonstration(row)


def test_a_sharegpt_conversation_in_json_text_is_read_too() -> None:
    assert one({"conversations": json.dumps(SHAREGPT)}, "demonstrations")["messages"] == [ASKED, REPLY]


def test_a_sharegpt_prompt_ends_before_the_last_reply_which_scorers_see() -> None:
    parsed = parse_prompt(one({"conversations": SHAREGPT}, "prompts"))
    assert parsed.prompt == [ASKED]
    assert parsed.columns == {"completion": "Blue."}
    assert one({"conversations": SHAREGPT[:1]}, "prompts") == {"prompt": [ASKED]}


@pytest.mark.parametrize(
    "side", ["Blue.", {"from": "gpt", "value": "Blue."}, [{"role": "assistant", "content": "Blue."}]]
)
def test_a_sharegpt_pair_has_texts_or_messages(side: Any) -> None:
    row = one({"conversations": SHAREGPT[:1], "chosen": side, "rejected": "Cow."}, "preferences")
    example = parse_preference(row)
    assert (example.prompt, example.responses) == ([ASKED], ("Blue.", "Cow."))


@pytest.mark.parametrize(
    ("conversations", "words"),
    [
        ([], "an empty list"),
        ("no list", "`conversations` is text; a list of messages was expected"),
        ([{"from": "human"}], "without the text `from` or `value`"),
        ([{"from": "stranger", "value": "a"}], "a message from 'stranger'; expected one of"),
        (["a"], "text where a message was expected"),
    ],
)
def test_the_problem_of_a_sharegpt_row_is_named(conversations: Any, words: str) -> None:
    assert words in problem({"conversations": conversations}, "demonstrations")


def test_an_alpaca_row_is_a_message_and_a_reply() -> None:
    assert one(ALPACA, "demonstrations") == {"prompt": [ASKED], "completion": "Blue."}
    with_input = one(ALPACA | {"input": "Not red.", "text": "all of it"}, "demonstrations")
    assert with_input["prompt"][0]["content"] == "Name a colour.\n\nNot red."
    assert one(ALPACA, "prompts") == {"prompt": [ASKED], "output": "Blue."}
    pair = one({"instruction": "Name a colour.", "chosen": "Blue.", "rejected": "Cow."}, "preferences")
    assert parse_preference(pair).prompt == [ASKED]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": " "}, "`instruction` is empty"),
        ({"output": ""}, "`output` is empty"),
        ({"input": 3}, "`input` is a number; text was expected"),
    ],
)
def test_the_problem_of_an_alpaca_row_is_named(change: dict[str, Any], words: str) -> None:
    assert words in problem(ALPACA | change, "demonstrations")


def test_completions_of_ultrafeedback_are_ranked_by_score_and_equal_scores_tie() -> None:
    example = parse_preference(one({"instruction": "Name a colour.", "completions": COMPLETIONS}, "preferences"))
    assert example.prompt == [ASKED]
    assert example.responses == ("Blue.", "Red.", "Cow.")
    assert example.preference == Ranking((2, 1))


def test_without_a_score_the_mean_of_the_annotations_ranks() -> None:
    completions = [
        {"response": "Cow.", "annotations": {"honesty": {"Rating": "2"}, "helpfulness": [{"Rating": "3"}]}},
        {"response": "Blue.", "annotations": {"honesty": 4, "helpfulness": 2}},
    ]
    row = {"instruction": "Name a colour.", "completions": completions}
    assert parse_preference(one(row, "preferences")).responses == ("Blue.", "Cow.")
    ratings = converted(row, "preferences", "ultrafeedback-ratings")
    assert parse_preference(ratings[0].values).preference == Rating({"honesty": 2.0, "helpfulness": 3.0})
    assert len(ratings) == 2


@pytest.mark.parametrize(
    ("completions", "words"),
    [
        ([{"response": "Blue."}, {"response": "Red."}], "neither `overall_score` nor `annotations`"),
        ([{"response": "Blue.", "overall_score": 1}], "a list of 2 or more was expected"),
        ([{"response": "Blue.", "overall_score": "N/A"}] * 2, "'N/A'; a number was expected"),
        ([{"overall_score": 1}] * 2, "no `response`"),
    ],
)
def test_the_problem_of_an_ultrafeedback_row_is_named(completions: Any, words: str) -> None:
    assert words in problem({"instruction": "Name a colour.", "completions": completions}, "preferences")


def binarised(first: float, second: float, prompt: str = "Name a colour.") -> dict[str, Any]:
    rejected = [ASKED, {"role": "assistant", "content": "Cow."}]
    scores = {"score_chosen": first, "score_rejected": second}
    return {"prompt": prompt, "chosen": [ASKED, REPLY], "rejected": rejected, "messages": [ASKED, REPLY]} | scores


def test_a_binarised_pair_has_its_prompt_in_both_conversations() -> None:
    example = parse_preference(one(binarised(8, 3), "preferences"))
    assert (example.prompt, example.responses, example.preference) == ([ASKED], ("Blue.", "Cow."), Pair())
    tie = parse_preference(one(binarised(8, 8), "preferences"))
    assert tie.preference == Pair(certainty=0.5)
    assert "3, less than `score_rejected`, 8" in problem(binarised(3, 8), "preferences")
    assert "`prompt` is not among the messages" in problem(binarised(8, 3, "Something else."), "preferences")


def test_a_solution_of_math_shepherd_has_its_labels_at_the_marks() -> None:
    solution = "Add 1 and 1: it is 2+0. Step 1: 1+1 = 2 {0}\nStep 2: 2-0 = 3 {1}\nStep 3: The answer is: 3 {1}"
    row = {"input": solution.format("ки", "ки"), "label": solution.format("+", "-"), "task": "GSM8K"}
    steps = ("Step 1: 1+1 = 2", "Step 2: 2-0 = 3", "Step 3: The answer is: 3")
    example = LabelledSteps("Add 1 and 1: it is 2+0.", steps, (1.0, 0.0, 0.0), is_complete=True)
    assert parse_steps(one(row, "step_labels")) == example
    assert "no 'Step 1:'" in problem(row | {"input": "2 ки"}, "step_labels")
    assert "`input` does not end with 'ки'" in problem(row | {"input": "Step 1: 2"}, "step_labels")
    assert "no + or - where step 1 ends" in problem(row | {"label": row["input"]}, "step_labels")


def prm800k(*steps: dict[str, Any], reason: str = "found_error") -> dict[str, Any]:
    return {"question": {"problem": "1+1?"}, "label": {"steps": list(steps), "finish_reason": reason}}


def prm800k_step(*ratings: int | None, chosen: int | None = None, human: str | None = None) -> dict[str, Any]:
    completions = [{"text": f"rated {rating}", "rating": rating} for rating in ratings]
    written = None if human is None else {"text": human}
    return {"completions": completions, "chosen_completion": chosen, "human_completion": written}


def test_each_completion_of_prm800k_is_labelled_once() -> None:
    row = prm800k(prm800k_step(0, -1, chosen=0), prm800k_step(-1, human="written"), prm800k_step(-1, None))
    parsed = [parse_steps(converted_row.values) for converted_row in converted(row, "step_labels")]
    assert parsed == [
        LabelledSteps("1+1?", ("rated 0", "written"), (1.0, 1.0)),
        LabelledSteps("1+1?", ("rated -1",), (0.0,)),
        LabelledSteps("1+1?", ("rated 0", "rated -1"), (None, 0.0)),
        LabelledSteps("1+1?", ("rated 0", "written", "rated -1"), (None, None, 0.0)),
    ]


def test_a_solution_of_prm800k_that_reaches_the_answer_is_complete() -> None:
    (row,) = converted(prm800k(prm800k_step(1, chosen=0), reason="solution"), "step_labels")
    assert parse_steps(row.values) == LabelledSteps("1+1?", ("rated 1",), (1.0,), is_complete=True)
    assert "has the rating 2; -1, 0 or 1 was expected" in problem(prm800k(prm800k_step(2)), "step_labels")
    assert "no step has a rating" in problem(prm800k(prm800k_step(None)), "step_labels")
    assert "`question` is text; an object was expected" in problem(prm800k() | {"question": "1+1?"}, "step_labels")


def test_a_solution_of_processbench_is_labelled_up_to_its_first_error() -> None:
    row = {"id": 1, "problem": "1+1?", "steps": ["a", "b", "c"], "label": 1}
    assert parse_steps(one(row, "step_labels")).labels == (1.0, 0.0, None)
    assert parse_steps(one(row | {"label": -1}, "step_labels")).labels == (1.0, 1.0, 1.0)
    assert "`label` is 3: the index of the first wrong one of `steps`" in problem(row | {"label": 3}, "step_labels")


def test_rows_in_align_columns_stay_as_they_are() -> None:
    rows: list[tuple[DataKind, dict[str, Any]]] = [
        ("demonstrations", {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}),
        ("preferences", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ("preferences", {"chosen": [ASKED, REPLY], "rejected": [ASKED, REPLY]}),
        ("step_labels", {"prompt": "a", "steps": ["b"], "labels": [1]}),
        ("step_labels", {"prompt": "a", "completions": ["b"], "labels": [1]}),
        ("prompts", {"prompt": "a", "instruction": "b"}),
        ("prompts", {"something": "else"}),
    ]
    for kind, values in rows:
        assert one(values, kind) == values


def test_a_form_is_recognised_and_noted_row_by_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [ALPACA, {"conversations": SHAREGPT}, {"messages": [ASKED, REPLY]}])))
    notes: list[str] = []
    rows = read_source_rows(SourceSettings(path=str(file)), "demonstrations", notes.append)
    assert [sorted(row.values) for row in rows] == [["completion", "prompt"], ["messages"], ["messages"]]
    assert [note.split(":")[0] for note in notes] == [
        "1 of 3 rows are read as alpaca",
        "1 of 3 rows are read as sharegpt",
    ]


def test_a_source_may_name_the_form_of_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ALPACA | {"text": "plain"}))
    (row,) = read_source_rows(SourceSettings(path=str(file), form="text"), "demonstrations")
    assert row.values["text"] == "plain"
    with pytest.raises(UserError, match="no form 'txt' of demonstrations; forms: completion, messages"):
        read_source_rows(SourceSettings(path=str(file), form="txt"), "demonstrations")


def test_an_alpaca_row_with_its_rendered_text_is_alpaca() -> None:
    form = form_of_row(ALPACA | {"text": "Below is an instruction …"}, "demonstrations")
    assert form is not None
    assert form.name == "alpaca"


def test_the_table_in_the_documentation_is_current() -> None:
    assert forms_table() in (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), (
        "write the output of `python -m align.data.forms` into docs/settings.md"
    )


def test_a_template_of_the_source_makes_the_prompt_of_an_alpaca_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ALPACA | {"input": "Not red."}))
    source = SourceSettings(path=str(file), template="{instruction} ({input}) ")
    (row,) = read_source_rows(source, "demonstrations")
    assert row.values == {"prompt": "Name a colour. (Not red.) ", "completion": "Blue."}
