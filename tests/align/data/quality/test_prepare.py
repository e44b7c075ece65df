"""`align data prepare`: each step mends what its check finds; splits and templates keep to the seed."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from align.cli import app
from align.data.quality.corpus import read_corpus
from align.data.quality.repairs import normalised_unicode
from align.data.quality.report import check_corpus
from align.data.quality.steps import CLEANING_STEPS, steps_table
from policies.errors import UserError
from tests.align.data.quality.clean_rows import (
    Row,
    alpaca,
    conversation,
    demonstration,
    pair,
    paragraph,
    prompt,
    rows_of,
    write_rows_to,
)
from tests.documents import ROOT


def run(*arguments: object, status: int = 0) -> dict[str, Any]:
    """The object that a command of `align data` prints."""
    result = CliRunner().invoke(app, ["data", *map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return dict(json.loads(result.stdout))


def refused(words: str, *arguments: object) -> None:
    with pytest.raises(UserError, match=words):
        CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False)


def written(path: Path) -> list[Row]:
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def prepared(folder: Path, rows: Sequence[Any], *options: object) -> tuple[list[Row], dict[str, Any]]:
    """The rows that are written, and the object that is printed."""
    file = write_rows_to(folder / "rows.jsonl", rows)
    record = run("prepare", file, "--to", folder / "clean.jsonl", *options)
    return written(folder / "clean.jsonl"), record


@pytest.mark.parametrize(
    ("step", "spoil"),
    [
        ("drop-empty", lambda row: row | {"rejected": " "}),
        ("drop-equal-pairs", lambda row: row | {"rejected": f"{row['chosen']} "}),
        ("drop-unreadable", lambda row: {"prompt": row["prompt"]}),
        ("drop-odd-characters", lambda row: row | {"chosen": f"{row['chosen'][:30]}\ufffd{row['chosen'][30:]}"}),
        ("drop-cut-off", lambda row: row | {"chosen": row["chosen"][:21]}),
        ("drop-outlier-lengths", lambda row: row | {"chosen": paragraph(Random(row["chosen"]), 60, 70)}),
        ("drop-turn-order", lambda row: row | {"prompt": [{"role": "assistant", "content": row["prompt"]}]}),
    ],
)
def test_a_step_drops_the_rows_that_its_check_finds_and_no_others(tmp_path: Path, step: str, spoil: Any) -> None:
    rows = rows_of(pair)
    spoiled = [spoil(row) if index % 30 == 7 else row for index, row in enumerate(rows)]
    kept, record = prepared(tmp_path, spoiled, "--steps", step)
    assert kept == [row for index, row in enumerate(rows) if index % 30 != 7]
    assert record["steps"] == [{"name": step, "removed": 5, "changed": 0, "rows": 145}]
    assert record["rows"] == 150


def test_of_duplicates_the_first_is_kept(tmp_path: Path) -> None:
    rows = rows_of(demonstration)
    for row in rows:
        row["completion"] += " " + paragraph(Random(row["completion"]), 4, 4)
    near = rows[3] | {"completion": rows[3]["completion"] + " Indeed."}
    spoiled = [*rows, rows[5], near, rows[5]]
    assert prepared(tmp_path, spoiled, "--steps", "drop-exact-duplicates")[0] == [*rows, near]
    kept, record = prepared(tmp_path, spoiled, "--replace")
    assert kept == rows
    removed = {step["name"]: step["removed"] for step in record["steps"]}
    assert (removed["drop-exact-duplicates"], removed["drop-near-duplicates"]) == (2, 1)


def test_contradictions_held_out_prompts_and_long_rows_are_dropped(tmp_path: Path) -> None:
    rows = rows_of(pair)
    opposite = rows[2] | {"chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]}
    kept, _ = prepared(tmp_path, [*rows, opposite], "--steps", "drop-contradictions")
    assert kept == rows[:2] + rows[3:]
    heldout = write_rows_to(tmp_path / "heldout.jsonl", [{"prompt": rows[4]["prompt"].upper()}])
    assert prepared(tmp_path, rows, "--heldout", heldout, "--replace")[0] == rows[:4] + rows[5:]
    kept, _ = prepared(tmp_path, rows, "--max-length", 60, "--replace")
    lengths = []
    for row in rows:
        asked, *responses = (len(row[name].split()) for name in ("prompt", "chosen", "rejected"))
        lengths.append(asked + max(responses))
    assert kept == [row for row, length in zip(rows, lengths, strict=True) if length <= 60]


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("cafÃ© itâ€™s â€œsoâ€\x9d", "café it’s “so”"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("ðŸ˜€ ok", "😀 ok"),
        ("cafÃƒÂ©", "café"),
        ("a\u200bb\x07c\ufeff", "abc"),
        ("e\u0301", "é"),
        ("\ud83dx", "x"),
        ("Café « CAFÉ » – ok\n\tyes", "Café « CAFÉ » – ok\n\tyes"),
    ],
)
def test_unicode_is_normalised(text: str, mended: str) -> None:
    assert normalised_unicode(text) == mended


@given(st.text(st.sampled_from("aéÃƒÂ©â€™œðŸ˜€Ð¿\u0301\u200b\ud83d\x9d\x07")))
@settings(max_examples=100)
def test_normalising_twice_is_normalising_once(text: str) -> None:
    once = normalised_unicode(text)
    assert normalised_unicode(once) == once


def test_text_steps_change_texts_alone_and_are_counted(tmp_path: Path) -> None:
    rows = rows_of(conversation, 5)
    rows[1]["messages"][1]["content"] += "</s>"
    rows[3]["messages"][0]["content"] += "\u200b"
    rows[4]["note"] = "</s>\u200b"
    kept, record = prepared(tmp_path, rows, "--steps", "strip-control-tokens,normalise-unicode")
    assert kept == [*rows_of(conversation, 4), rows[4]]
    assert [(step["removed"], step["changed"]) for step in record["steps"]] == [(0, 1), (0, 1)]


def test_a_prepared_file_has_none_of_the_problems_that_steps_mend(tmp_path: Path) -> None:
    rows = rows_of(demonstration)
    rows += [
        rows[0],
        rows[1] | {"completion": ""},
        rows[2] | {"completion": rows[9]["completion"] + " CafÃ©\ud83d."},
        {"prompt": "Why?"},
    ]
    rows.append(rows[4] | {"completion": rows[4]["completion"].upper()})
    prepared(tmp_path, rows)
    assert check_corpus(read_corpus([tmp_path / "clean.jsonl"])).problems == 0


def test_a_split_has_each_prompt_on_one_side_and_keeps_all_rows(tmp_path: Path) -> None:
    rows = rows_of(pair, 60)
    for index, row in enumerate(rows[:60]):
        rows.append(row | {"prompt": row["prompt"].upper(), "chosen": paragraph(Random(index))})
    kept, record = prepared(tmp_path, rows, "--steps", "", "--heldout-share", 0.25, "--seed", 3)
    heldout = written(tmp_path / "clean-heldout.jsonl")
    assert [each["rows"] for each in record["written"]] == [len(kept), len(heldout)] == [90, 30]
    sides = [{row["prompt"].casefold() for row in side} for side in (kept, heldout)]
    assert not sides[0] & sides[1]
    assert sorted(map(str, [*kept, *heldout])) == sorted(map(str, rows))


def test_the_seed_alone_decides_split_and_templates(tmp_path: Path) -> None:
    templates = tmp_path / "templates.yaml"
    templates.write_text('- "Question: {prompt}\\nAnswer:"\n- "{prompt} ({source})"\n')
    rows = [row | {"source": index} for index, row in enumerate(rows_of(demonstration, 60))]
    options = ("--template", templates, "--heldout-share", 0.2)
    results = []
    for seed in (1, 1, 2):
        kept, _ = prepared(tmp_path, rows, *options, "--seed", seed, "--replace")
        results.append((kept, written(tmp_path / "clean-heldout.jsonl")))
    assert results[0] == results[1] != results[2]
    originals = {row["completion"]: row for row in rows}
    shapes = set()
    for row in results[0][0]:
        before = originals[row["completion"]]
        forms = [f"Question: {before['prompt']}\nAnswer:", f"{before['prompt']} ({before['source']})"]
        shapes.add(forms.index(row["prompt"]))
    assert shapes == {0, 1}


def test_the_last_message_is_put_into_the_template_and_forms_become_align_columns(tmp_path: Path) -> None:
    templates = tmp_path / "templates.yaml"
    templates.write_text('["Please: {prompt}"]')
    row = {"instruction": "Name {x}.", "output": "It is done.", "system": "Be kind."}
    (kept,), _ = prepared(tmp_path, [row], "--template", templates)
    system = {"role": "system", "content": "Be kind."}
    expected = {"prompt": [system, {"role": "user", "content": "Please: Name {x}."}], "completion": "It is done."}
    assert kept == expected
    kept_rows, _ = prepared(tmp_path, rows_of(alpaca, 3), "--replace")
    assert all(set(row) == {"prompt", "completion"} for row in kept_rows)


def test_nothing_is_overwritten_unless_asked_and_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    file = write_rows_to(tmp_path / "rows.jsonl", rows_of(prompt, 5))
    to = tmp_path / "clean.jsonl"
    to.write_text("old")
    refused("clean.jsonl already exists", "prepare", file, "--to", to)
    bad = write_rows_to(tmp_path / "bad.jsonl", [*rows_of(prompt, 5), "no JSON"])
    options = ("--to", to, "--replace", "--steps", "")
    refused("1 row cannot be read, such as .*bad.jsonl:6: not valid JSON", "prepare", bad, *options)
    assert to.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "clean.jsonl", "rows.jsonl"]
    run("prepare", file, "--to", to, "--replace")
    assert written(to) == rows_of(prompt, 5)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("no step 'drop-all'; steps: normalise-unicode", ("--steps", "drop-all")),
        ("drop-heldout-overlap needs --heldout", ("--steps", "drop-heldout-overlap")),
        ("limit-length needs --max-length", ("--steps", "limit-length")),
        ("a number between 0 and 1", ("--heldout-share", 1.5)),
        ("1 different prompt cannot be split", ("--heldout-share", 0.5)),
        ("--kind pears: expected one of", ("--kind", "pears")),
        ("--column a: expected NEW=OLD", ("--column", "a")),
        ("no row is left", ("--max-length", 1)),
    ],
)
def test_mistakes_are_named(tmp_path: Path, words: str, options: Sequence[object]) -> None:
    file = write_rows_to(tmp_path / "rows.jsonl", rows_of(prompt, 1))
    refused(words, "prepare", file, "--to", tmp_path / "clean.jsonl", *options)


@pytest.mark.parametrize(
    ("templates", "words"),
    [
        ("{a: b}", "a YAML list of texts was expected"),
        ("['no place']", "number 1 is not a text with {prompt}"),
        ("['{prompt} {price}']", "rows.jsonl:1: the template names `price`"),
        ("['{prompt} {0}']", "number 1: .0. is not the name of a column alone"),
        ("[", "cannot be read"),
    ],
)
def test_mistakes_in_templates_are_named(tmp_path: Path, templates: str, words: str) -> None:
    file = write_rows_to(tmp_path / "rows.jsonl", rows_of(prompt, 2))
    (tmp_path / "templates.yaml").write_text(templates)
    refused(words, "prepare", file, "--to", tmp_path / "clean.jsonl", "--template", tmp_path / "templates.yaml")


def test_check_prints_writes_and_exits_by_what_it_finds(tmp_path: Path) -> None:
    file = write_rows_to(tmp_path / "rows.jsonl", rows_of(pair))
    clean = run("check", file, "--to", tmp_path / "report")
    assert clean["problems"] == 0
    assert json.loads((tmp_path / "report" / "check.json").read_text()) == clean
    assert (tmp_path / "report" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    refused("report already exists", "check", file, "--to", tmp_path / "report")
    write_rows_to(file, [*rows_of(pair), rows_of(pair)[0]])
    found = run("check", file, "--locations", 0, status=1)
    assert found["findings"][0]["kind"] == "exact-duplicates"
    assert found["findings"][0]["locations"] == []
    table = CliRunner().invoke(app, ["data", "check", str(file)])
    assert "exact-duplicates" in table.stdout


def test_columns_are_renamed_and_unknown_ones_are_named(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in rows_of(demonstration, 30)]
    file = write_rows_to(tmp_path / "rows.jsonl", rows)
    refused("not recognised what the rows are; columns: question, answer", "check", file)
    renamed = run("check", file, "--column", "prompt=question", "--column", "completion=answer")
    assert (renamed["kind"], renamed["forms"]) == ("demonstrations", {"completion": 30})


def test_the_table_of_steps_in_the_documentation_is_current() -> None:
    assert steps_table() in (ROOT / "docs" / "data-check.md").read_text(encoding="utf-8"), (
        "write the output of `python -m align.data.quality.steps` into docs/data-check.md"
    )
    assert len({step.name for step in CLEANING_STEPS}) == len(CLEANING_STEPS)
