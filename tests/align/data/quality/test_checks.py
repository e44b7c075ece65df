"""Each check finds the rows with its fault, all of them and no others, and nothing in clean files."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from align.cli import app
from align.data.quality.corpus import read_corpus
from align.data.quality.report import check_corpus, report_record
from policies.errors import UserError
from tests.align.data.quality.clean_rows import (
    MAKERS,
    Row,
    alpaca,
    checked,
    choice,
    conversation,
    demonstration,
    labelled,
    pair,
    paragraph,
    problems,
    prompt,
    ranking,
    rating,
    rows_of,
    sharegpt,
    transcripts,
    write_rows_to,
)
from tests.outside_data import outside_data, outside_model

PLACES = (7, 40, 41, 99, 120, 148)
"""The lines with a fault, from 1."""


def planted(make: Any, spoil: Callable[[Row], Any]) -> list[Any]:
    rows = rows_of(make)
    for place in PLACES:
        rows[place - 1] = spoil(rows[place - 1])
    return rows


def setting(name: str, change: Callable[[Any], Any]) -> Callable[[Row], Row]:
    return lambda row: row | {name: change(row[name])}


def text_with(addition: str) -> Callable[[Row], Row]:
    return setting("completion", lambda text: f"{text[:20]}{addition}{text[20:]}")


def messages(change: Callable[[Any], Any]) -> Callable[[Row], Row]:
    return lambda row: {name: change(value) for name, value in row.items()}


SYSTEM: Row = {"role": "system", "content": "Be kind."}
CASES = {
    "empty-fields": [
        (demonstration, setting("completion", lambda text: "")),
        (demonstration, setting("prompt", lambda text: " \n")),
        (demonstration, setting("completion", lambda text: None)),
        (conversation, messages(lambda turns: [*turns[:-1], turns[-1] | {"content": " "}])),
        (sharegpt, messages(lambda turns: [*turns[:-1], turns[-1] | {"value": ""}])),
        (alpaca, setting("instruction", lambda text: "")),
        (ranking, setting("responses", lambda texts: ["", *texts[1:]])),
        (transcripts, setting("chosen", lambda text: text[: text.rindex("Assistant:") + 11])),
    ],
    "cut-off-texts": [
        (demonstration, setting("completion", lambda text: text[: len(text) // 2].rstrip(" ."))),
        (conversation, messages(lambda turns: [*turns[:-1], turns[-1] | {"content": turns[-1]["content"][:33]}])),
        (pair, setting("rejected", lambda text: text.rpartition(" the ")[0] + " the")),
        (prompt, setting("prompt", lambda text: text[:41])),
    ],
    "odd-characters": [
        (demonstration, text_with("cafÃ©")),
        (demonstration, text_with("itâ€™s")),
        (demonstration, text_with("Ð¿Ñ€Ð¸")),
        (demonstration, text_with("ä½\xa0å¥½")),
        (demonstration, text_with("ï¿½")),
        (demonstration, text_with("\ufffd")),
        (demonstration, text_with("\x07")),
        (demonstration, text_with("\u200b")),
        (demonstration, text_with("a\u200db")),
        (demonstration, text_with("\ud83d")),
    ],
    "control-tokens": [
        (demonstration, setting("completion", lambda text: f"{text}</s>")),
        (demonstration, text_with("<|im_end|>")),
        (conversation, messages(lambda turns: [turns[0] | {"content": "[INST] Why? [/INST]"}, *turns[1:]])),
    ],
    "equal-pairs": [
        (pair, lambda row: row | {"rejected": row["chosen"]}),
        (pair, lambda row: row | {"rejected": " " + row["chosen"].replace(". ", ".\n")}),
        (ranking, setting("responses", lambda texts: [texts[1], *texts[1:]])),
        (transcripts, lambda row: row | {"chosen": row["rejected"]}),
    ],
    "unreadable-rows": [
        (demonstration, lambda row: json.dumps(row)[:-9]),
        (demonstration, lambda row: [1, 2]),
        (demonstration, lambda row: {"prompt": row["prompt"]}),
        (demonstration, lambda row: {"prompt": row["prompt"], "completoin": row["completion"]}),
        (demonstration, setting("completion", lambda text: 5)),
        (demonstration, lambda row: row | {"added": 1}),
        (labelled, setting("label", str)),
        (ranking, setting("ranks", lambda ranks: ranks[1:])),
        (sharegpt, lambda row: {"conversations": 3}),
    ],
    "outlier-lengths": [
        (demonstration, setting("completion", lambda text: paragraph(Random(text), 60, 80))),
        (prompt, setting("prompt", lambda text: paragraph(Random(text), 30, 40))),
    ],
    "turn-order": [
        (conversation, messages(lambda turns: [turns[0], *turns[2:]])),
        (conversation, messages(lambda turns: [*turns[:2], SYSTEM, *turns[2:]])),
        (conversation, messages(lambda turns: turns[:-1])),
        (conversation, messages(lambda turns: [{"content": "Why?"}, *turns[1:]])),
        (conversation, messages(lambda turns: [turns[0] | {"role": "stranger"}, *turns[1:]])),
        (sharegpt, messages(lambda turns: [turns[0], *turns[2:]])),
        (sharegpt, messages(lambda turns: [{"value": "Why?"}, *turns[1:]])),
        (transcripts, messages(lambda text: text.replace("\n\nAssistant:", "\n\nHuman:", 1))),
    ],
}
ALL_CASES = [(kind, *case) for kind, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("kind", "make", "spoil"), ALL_CASES)
def test_a_planted_fault_is_found_where_it_is_and_nothing_else(
    tmp_path: Path, kind: str, make: Any, spoil: Callable[[Row], Any]
) -> None:
    assert problems(checked(tmp_path, planted(make, spoil))) == {kind: list(PLACES)}


@pytest.mark.parametrize("make", MAKERS)
def test_a_clean_file_has_no_problem(tmp_path: Path, make: Any) -> None:
    record = checked(tmp_path, rows_of(make), heldout=rows_of(prompt, 50, seed=1))
    assert problems(record) == {}
    assert record["problems"] == 0


LANGUAGES = (
    "Café – naïve, „ja“, ÅÄÖ, NÃO, « CAFÉ ».",
    "Привет, κόσμε! 你好。",
    "می\u200cخواهم.",
    "A family: \U0001f469\u200d\U0001f469\u200d\U0001f467.",
)


@pytest.mark.parametrize("text", LANGUAGES)
def test_letters_of_other_languages_and_emoji_are_not_odd(tmp_path: Path, text: str) -> None:
    assert problems(checked(tmp_path, [{"prompt": "Say it in your way.", "completion": text}])) == {}


def test_exact_duplicates_are_the_later_copies(tmp_path: Path) -> None:
    for make in MAKERS:
        rows = rows_of(make)
        rows += [rows[3], rows[9] | {"id": 5}, rows[3]]
        assert problems(checked(tmp_path, rows))["exact-duplicates"] == [151, 152, 153]


def test_another_rating_of_the_same_response_is_no_exact_duplicate(tmp_path: Path) -> None:
    rows = rows_of(rating)
    assert "exact-duplicates" not in problems(checked(tmp_path, [*rows, rows[0] | {"rating": rows[0]["rating"] + 1}]))


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda text: text.replace(".", " !"),
        lambda text: f"{text} Indeed.",
        lambda text: text.replace("The ", "That ", 1),
    ],
)
def test_near_duplicates_differ_in_case_punctuation_or_few_words(tmp_path: Path, change: Callable[[str], str]) -> None:
    rows = rows_of(demonstration)
    for row in rows:
        row["completion"] += " " + paragraph(Random(row["completion"]), 4, 4)
    rows += [row | {"completion": change(row["completion"])} for row in rows[:4]]
    assert problems(checked(tmp_path, rows)) == {"near-duplicates": [151, 152, 153, 154]}


def test_other_responses_to_a_prompt_and_other_numbers_are_no_near_duplicates(tmp_path: Path) -> None:
    rows = rows_of(pair)
    rows += [row | {"chosen": paragraph(Random(number))} for number, row in enumerate(rows[:20])]
    assert problems(checked(tmp_path, rows)) == {}
    sums = "A long story about a shop that sells apples by the box ends with a sum: what is {0} and {0} and one?"
    rows = [{"prompt": sums.format(number), "completion": f"It is {2 * number + 1}."} for number in range(100)]
    assert problems(checked(tmp_path, rows)) == {}


def test_a_template_around_all_prompts_makes_none_of_them_similar(tmp_path: Path) -> None:
    template = "Below is a question. Answer it in a few sentences, as well as you can, and be kind to whom asks it. {}"
    rows = [{"prompt": template.format(row["prompt"])} for row in rows_of(prompt)]
    assert problems(checked(tmp_path, rows)) == {}
    system: Row = {"role": "system", "content": template}
    conversations = [{"prompt": [system, {"role": "user", "content": row["prompt"]}]} for row in rows_of(prompt)]
    assert problems(checked(tmp_path, conversations)) == {}


def test_many_texts_of_the_greatest_length_are_cut_off(tmp_path: Path) -> None:
    for cut in (lambda text: text[:180], lambda text: " ".join(text.split()[:25])):
        rows = [row | {"completion": cut(row["completion"])} for row in rows_of(demonstration)]
        found = problems(checked(tmp_path, rows))
        assert list(found) == ["cut-off-texts"]
        assert len(found["cut-off-texts"]) > 40


def test_complete_texts_without_a_full_stop_are_a_fact(tmp_path: Path) -> None:
    rows = planted(demonstration, setting("completion", lambda text: text.rstrip(".")))
    record = checked(tmp_path, rows)
    assert problems(record) == {}
    (fact,) = record["findings"]
    assert (fact["kind"], fact["count"]) == ("cut-off-texts", len(PLACES))


def test_texts_that_mostly_have_no_end_are_not_cut_off(tmp_path: Path) -> None:
    rows = [row | {"completion": row["completion"].rstrip(".")} for row in rows_of(demonstration)]
    assert checked(tmp_path, rows)["findings"] == []


def test_control_tokens_in_nearly_all_rows_are_a_rendered_file_and_a_fact(tmp_path: Path) -> None:
    rows = [{"text": f"<|im_start|>user\n{row['prompt']}<|im_end|>"} for row in rows_of(prompt)]
    record = checked(tmp_path, rows)
    assert problems(record) == {}
    assert [finding["kind"] for finding in record["findings"]] == ["control-tokens"]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: f" {text.upper()} ",
        lambda text: [SYSTEM, {"role": "user", "content": text}],
        lambda text: f"Please: {text}",
    ],
)
def test_held_out_prompts_are_found_however_they_are_written(tmp_path: Path, change: Callable[[str], Any]) -> None:
    rows = rows_of(demonstration)
    heldout = [{"prompt": change(rows[place - 1]["prompt"])} for place in PLACES] + rows_of(prompt, 40, seed=1)
    assert problems(checked(tmp_path, rows, heldout)) == {"heldout-overlap": list(PLACES)}


def test_the_first_question_of_a_conversation_is_a_prompt_too(tmp_path: Path) -> None:
    rows = rows_of(conversation)
    heldout = [{"prompt": rows[6]["messages"][0]["content"]}, {"prompt": "Why?"}]
    assert problems(checked(tmp_path, rows, heldout)) == {"heldout-overlap": [7]}


def reversed_pair(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def test_opposite_pairs_rankings_and_choices_contradict_each_other(tmp_path: Path) -> None:
    for make, opposite in (
        (pair, reversed_pair),
        (ranking, setting("ranks", lambda ranks: [-rank for rank in ranks])),
        (choice, setting("best", lambda best: (best + 1) % 4)),
    ):
        rows = rows_of(make)
        rows += [opposite(rows[place - 1]) for place in PLACES]
        found = problems(checked(tmp_path, rows))
        assert found == {"contradicting-rankings": [*PLACES, *range(151, 157)]}


def test_a_circle_of_preferences_is_a_contradiction_and_a_chain_is_none(tmp_path: Path) -> None:
    asked, a, b, c = (text["prompt"] for text in rows_of(prompt, 4))
    chain = [{"prompt": asked, "chosen": a, "rejected": b}, {"prompt": asked, "chosen": b, "rejected": c}]
    assert problems(checked(tmp_path, [*chain, {"prompt": asked, "chosen": a, "rejected": c}])) == {}
    circle = [*chain, {"prompt": asked, "chosen": c, "rejected": a}]
    assert problems(checked(tmp_path, circle)) == {"contradicting-rankings": [1, 2, 3]}
    other = [*chain, {"prompt": asked, "chosen": c, "rejected": a, "attribute": "brevity"}]
    assert problems(checked(tmp_path, other)) == {}


def by_length(row: Row, name: str = "rejected") -> Row:
    shorter, longer = sorted((row["chosen"], row["rejected"]), key=len)
    return row | {"chosen": longer, "rejected": shorter}


def test_length_bias_is_a_problem_where_the_longer_one_mostly_wins(tmp_path: Path) -> None:
    rows = rows_of(pair)
    assert problems(checked(tmp_path, [by_length(row) for row in rows[:100]] + rows[100:])).keys() == {"length-bias"}
    shorter = [reversed_pair(by_length(row)) for row in rows]
    assert problems(checked(tmp_path, shorter)).keys() == {"length-bias"}
    ranked = [row | {"ranks": [-len(text) for text in row["responses"]]} for row in rows_of(ranking)]
    assert problems(checked(tmp_path, ranked)).keys() == {"length-bias"}
    rated = [row | {"rating": 1 + len(row["response"]) // 60} for row in rows_of(rating)]
    assert problems(checked(tmp_path, rated)).keys() == {"length-bias"}


def test_the_share_of_length_bias_is_that_of_pairs_of_unequal_length(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Name it.", "chosen": "a b c.", "rejected": "a b."},
        {"prompt": "Name that.", "chosen": "d.", "rejected": "d e."},
        {"prompt": "Name this.", "chosen": "f g.", "rejected": "h."},
        {"prompt": "Name those.", "chosen": "i j.", "rejected": "k l."},
    ]
    (finding,) = (each for each in checked(tmp_path, rows)["findings"] if each["kind"] == "length-bias")
    assert (finding["count"], finding["share"], finding["severity"]) == (2, 0.666667, "fact")


def test_a_dominant_label_rating_choice_or_tie_is_an_imbalance(tmp_path: Path) -> None:
    for make, name, value in ((labelled, "label", 1), (rating, "rating", 5), (choice, "best", 0), (pair, "tie", True)):
        rows = rows_of(make)
        few = [row | {name: value} if index % 5 == 0 else row for index, row in enumerate(rows)]
        assert problems(checked(tmp_path, few)) == {}
        most = [row | {name: value} if index % 8 else row for index, row in enumerate(rows)]
        assert problems(checked(tmp_path, most)).keys() == {"label-imbalance"}


def test_rows_above_a_limit_are_too_long(tmp_path: Path) -> None:
    lengths = [len((row["prompt"] + " " + row["completion"]).split()) for row in rows_of(demonstration)]
    longest = max(lengths)
    found = problems(checked(tmp_path, rows_of(demonstration), max_length=longest - 1))
    assert found == {"outlier-lengths": [line for line, length in enumerate(lengths, start=1) if length == longest]}
    assert problems(checked(tmp_path, rows_of(demonstration), max_length=longest)) == {}


def test_with_a_model_lengths_are_tokens_and_its_template_is_tried(tmp_path: Path) -> None:
    model = outside_model()
    spoil = messages(lambda turns: [*turns[:-1], turns[-1] | {"tool_calls": [{"name": "look"}]}])
    record = checked(tmp_path, planted(conversation, spoil), model=model)
    assert problems(record) == {"chat-template-failures": list(PLACES)}
    assert record["unit"] == "tokens"
    words = checked(tmp_path, planted(conversation, spoil))
    assert words["lengths"]["row"]["p50"] < record["lengths"]["row"]["p50"]
    assert words["not_checked"]["chat-template-failures"] == "needs --model"
    tokens = planted(demonstration, text_with("<|eos|>"))
    assert problems(checked(tmp_path, tokens, model=model)) == {"control-tokens": list(PLACES)}


def test_responses_that_begin_with_their_prompts_are_echoes(tmp_path: Path) -> None:
    rows = rows_of(demonstration)
    echoing = [row | {"completion": f"{row['prompt']} {row['completion']}"} for row in rows[:20]] + rows[20:]
    assert problems(checked(tmp_path, echoing)) == {"echoed-prompts": list(range(1, 21))}


def test_several_files_are_checked_together(tmp_path: Path) -> None:
    rows = rows_of(demonstration)
    files = [write_rows_to(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    record = report_record(check_corpus(read_corpus(files)), 2)
    (finding,) = record["findings"]
    assert finding["locations"] == [f"{files[1]}:1", f"{files[1]}:2"]
    assert (finding["count"], finding["share"], record["rows"]) == (150, 0.5, 300)


def test_empty_cells_of_csv_are_empty_fields(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    lines = [f'"{row["prompt"]}","{row["completion"]}"' for row in rows_of(demonstration)]
    lines[10] = lines[10].split(",")[0] + ","
    file.write_text("\n".join(["prompt,completion", *lines]))
    assert problems(report_record(check_corpus(read_corpus([file])), 9)) == {"empty-fields": [12]}


def test_real_preferences_have_the_faults_that_reading_them_shows(tmp_path: Path) -> None:
    lines = outside_data("hh/harmless.jsonl").read_text(encoding="utf-8").splitlines()[:830]
    found = problems(checked(tmp_path, lines))
    assert found.keys() == {"cut-off-texts", "empty-fields", "odd-characters", "turn-order"}
    assert found["empty-fields"] == [65, 694, 828]
    assert found["odd-characters"] == [315]


def test_real_word_problems_are_clean_but_for_one_invisible_character(tmp_path: Path) -> None:
    lines = outside_data("gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()[-600:]
    solved = [json.loads(line) for line in lines]
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in solved]
    assert problems(checked(tmp_path, rows)).keys() == {"odd-characters"}


def test_a_file_of_unreadable_rows_is_checked(tmp_path: Path) -> None:
    file = write_rows_to(tmp_path / "rows.jsonl", ["no JSON", "[]"])
    record = report_record(check_corpus(read_corpus([file], "demonstrations")), 9)
    assert problems(record) == {"unreadable-rows": [1, 2]}
    assert record["lengths"] == {}


def test_messages_are_rendered_by_a_template_that_the_model_lacks(tiny_model: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a mat"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": talk}))
    command = ["data", "check", str(file), "--json"]
    without = CliRunner().invoke(app, [*command, "--model", str(tiny_model)])
    assert "the tokenizer has no chat template" in without.stdout
    given = CliRunner().invoke(app, [*command, "--model", str(tiny_model), "--chat-template", "plain"])
    assert given.exit_code == 0
    assert "template" not in given.stdout
    with pytest.raises(UserError, match="--chat-template needs --model"):
        CliRunner().invoke(app, [*command, "--chat-template", "plain"], catch_exceptions=False)
