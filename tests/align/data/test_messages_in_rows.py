"""Messages in files: JSON text of messages, and keys that Parquet adds."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from align.config.schema import SourceSettings
from align.data.parsing import parse_demonstration, parse_prompt, parse_rows
from align.data.readers import read_rows
from align.data.source_row import SourceRow
from rewards.preferences import parse_preference

USER = {"role": "user", "content": "Hi, you"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Bern"}}]}
OTHER_CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "sum", "arguments": {"of": [1, 2]}}]}
CALLS: list[dict[str, Any]] = [
    {"prompt": [USER, CALL, USER], "facts": {"a": 1}},
    {"prompt": [USER, OTHER_CALL, USER], "facts": {"b": 2}},
    {"prompt": [USER], "facts": {"a": None}},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content }}"
    "{% if 'tool_calls' in m %}{{ m.tool_calls | tojson }}{% endif %}\n{% endfor %}"
)


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> str:
    """Rows in a file, in CSV with the JSON text of what is no text."""
    path = folder / f"rows.{form}"
    if form == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({name: in_json(value) for name, value in row.items()})
    return str(path)


def in_json(value: Any) -> Any:
    return value if isinstance(value, str | None) else json.dumps(value)


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the JSON text of each column that is no text."""
    return {name: in_json(value) for name, value in row.items()}


def read(path: str, notes: list[str] | None = None) -> list[SourceRow]:
    source = SourceSettings(path=path)
    return read_rows(source) if notes is None else read_rows(source, notes.append)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "response": [YES], "rating": 3},
    ],
    ids=["pair", "whole lists", "rating"],
)
def test_json_text_of_messages_gives_the_example_that_messages_give(
    tmp_path: Path, form: str, row: dict[str, Any]
) -> None:
    (read_row,) = read(write(tmp_path, form, [as_text(row)]))
    assert parse_preference(read_row.values) == parse_preference(row)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize(
    "row", [{"messages": [USER, YES]}, {"prompt": [USER], "completion": [YES]}], ids=["messages", "prompt"]
)
def test_json_text_of_messages_gives_the_demonstration_that_messages_give(
    tmp_path: Path, form: str, row: dict[str, Any]
) -> None:
    (read_row,) = read(write(tmp_path, form, [as_text(row)]))
    assert parse_demonstration(read_row.values) == parse_demonstration(row)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_json_text_of_messages_in_a_list_of_responses(tmp_path: Path, form: str) -> None:
    row = {"prompt": "a", "responses": [json.dumps([YES]), json.dumps([NO])], "best": 1}
    (read_row,) = read(write(tmp_path, form, [row]))
    assert parse_preference(read_row.values).responses == ("No", "Yes")


def test_rows_without_a_value_do_not_count(tmp_path: Path) -> None:
    prompts = [json.dumps([USER]), None, " "]
    rows = [{"prompt": prompt, "id": number} for number, prompt in enumerate(prompts)]
    read_in = read(write(tmp_path, "jsonl", rows))
    assert [row.values["prompt"] for row in read_in] == [[USER], None, " "]


def test_a_column_with_one_row_of_another_kind_stays_text_and_a_note_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": json.dumps([USER])}, {"prompt": '[{"role": "user"'}, {"prompt": json.dumps([YES])}]
    notes: list[str] = []
    read_in = read(write(tmp_path, "csv", rows), notes)
    assert [row.values for row in read_in] == rows
    assert notes == [
        f"`prompt` is read as text: 2 of its 3 rows are messages in JSON, {tmp_path / 'rows.csv'}:3 is not"
    ]


def test_one_bad_text_in_messages_is_the_problem_of_its_row_alone(tmp_path: Path) -> None:
    good = json.dumps([USER, YES])
    rows = [{"messages": text} for text in (good, good[:-1], str([USER, YES]), "Hello", good)]
    path = write(tmp_path, "csv", rows)
    parsed = parse_rows(read(path), parse_demonstration, on_bad_row="skip")
    assert parsed.items == [parse_demonstration({"messages": [USER, YES]})] * 2
    unfinished, python, words = parsed.skipped
    assert unfinished.startswith(f"{path}:3: `messages`: the text is not JSON: Expecting ',' delimiter")
    assert python.startswith(f"{path}:4: `messages`: the text is Python's notation, and not JSON: Expecting property")
    assert words.startswith(f"{path}:5: `messages`: the text is not JSON: Expecting value")


def test_messages_beside_a_prompt_are_a_further_column_that_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "messages": "3 messages"}, {"prompt": "b", "messages": json.dumps([USER])}]
    assert [row.values for row in read(write(tmp_path, "csv", rows))] == rows


def test_a_note_says_which_columns_are_read_as_messages(tmp_path: Path) -> None:
    row = {"prompt": json.dumps([USER]), "chosen": "yes", "rejected": "no"}
    notes: list[str] = []
    read(write(tmp_path, "csv", [row]), notes)
    assert notes == ["`prompt`, JSON text, is read as messages"]
    notes.clear()
    read(write(tmp_path, "jsonl", [{"prompt": [USER], "chosen": "yes", "rejected": "no"}]), notes)
    assert notes == []


@pytest.mark.parametrize("text", ["[1, 2]", "[]", '{"role": "user", "content": "a"}', "[" * 5000, '[{"content": "a"}]'])
def test_other_json_stays_text(tmp_path: Path, text: str) -> None:
    notes: list[str] = []
    (row,) = read(write(tmp_path, "jsonl", [{"prompt": text}]), notes)
    assert row.values == {"prompt": text}
    assert notes == []


def test_other_columns_stay_text(tmp_path: Path) -> None:
    row = {"prompt": "a", "answer": json.dumps([USER]), "responses": json.dumps(["b", "c"])}
    (read_row,) = read(write(tmp_path, "csv", [row]))
    assert read_row.values == row


def test_a_key_that_stands_twice_in_json_text_is_a_bad_row(tmp_path: Path) -> None:
    twice = '[{"role": "user", "content": "a", "content": "b"}]'
    first, second = read(write(tmp_path, "csv", [{"prompt": json.dumps([USER])}, {"prompt": twice}]))
    assert first.problem is None
    assert second.problem == "`prompt`: the key 'content' occurs twice in one object"


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "parquet"])
def test_the_template_renders_messages_from_any_file_alike(
    tmp_path: Path, form: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Parquet gives all messages of a column the same keys, and all calls the same arguments: null where absent."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    expected = [tokenizer.apply_chat_template(row["prompt"]) for row in CALLS]
    rows = read(write(tmp_path, form, CALLS))
    assert [tokenizer.apply_chat_template(parse_prompt(row.values).prompt) for row in rows] == expected


@pytest.mark.parametrize("column", ["prompt", "messages", "chosen", "rejected", "completion", "response", "tools"])
def test_keys_without_a_value_are_dropped_from_messages_and_tools(tmp_path: Path, column: str) -> None:
    objects = [{"role": "user", "content": "a", "name": None, "tool_calls": [{"a": None, "b": [None, 0, ""]}]}]
    (row,) = read(write(tmp_path, "jsonl", [{column: objects}]))
    assert row.values[column] == [{"role": "user", "content": "a", "tool_calls": [{"b": [None, 0, ""]}]}]


def test_keys_without_a_value_are_dropped_from_each_response(tmp_path: Path) -> None:
    (row,) = read(write(tmp_path, "jsonl", [{"responses": [[{"role": "user", "name": None}], "text", None]}]))
    assert row.values["responses"] == [[{"role": "user"}], "text", None]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_other_columns_keep_their_nulls(tmp_path: Path, form: str) -> None:
    row = {"prompt": [USER], "facts": {"a": 1, "b": None}, "answer": None, "rows": [{"role": "user", "x": None}]}
    (read_row,) = read(write(tmp_path, form, [row]))
    assert read_row.values == row


def test_messages_that_are_nested_too_deeply_are_a_bad_row(tmp_path: Path) -> None:
    deep = "[" * 700 + "]" * 700
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": [{{"role": "user", "content": "a", "x": {deep}}}]}}\n')
    (row,) = read(str(path))
    assert row.problem is None or "nested too deeply" in row.problem
