import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from align.config.schema import SourceSettings
from align.data.readers import Demonstration, parse_demonstration, parse_prompt, parse_rows, read_rows, split_heldout
from policies.errors import UserError

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": 'b, "c"\nd', "answer": 2}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(str(path))
    elif name.endswith(".csv"):
        Dataset.from_list(rows).to_csv(str(path))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.csv", "r.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = read_rows(SourceSettings(path=write(tmp_path, name, ROWS)))
    assert [row.values["prompt"] for row in rows] == ["a", 'b, "c"\nd']
    assert [float(row.values["answer"]) for row in rows] == [1, 2]
    assert all(name in row.where for row in rows)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "2.jsonl", ROWS[1:])
    write(tmp_path, "1.csv", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert [row.values["prompt"] for row in read_rows(SourceSettings(path=str(tmp_path)))] == ["a", 'b, "c"\nd']


def test_columns_are_renamed_and_the_others_stay(tmp_path: Path) -> None:
    path = write(tmp_path, "r.jsonl", [{"question": "q", "prompt": "old", "id": 7}])
    (row,) = read_rows(SourceSettings(path=path, columns={"prompt": "question"}))
    assert row.values == {"prompt": "q", "id": 7}


def test_a_renaming_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "r.jsonl", ROWS)
    with pytest.raises(UserError, match="asks for 'question' as 'prompt', and no row has it; known: prompt, answer"):
        read_rows(SourceSettings(path=path, columns={"prompt": "question"}))


def test_limit(tmp_path: Path) -> None:
    assert len(read_rows(SourceSettings(path=write(tmp_path, "r.jsonl", ROWS), limit=1))) == 1


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]" if name == "r.json" else "")
    with pytest.raises(UserError, match=f"{name} has no rows"):
        read_rows(SourceSettings(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("r.json", "{", "r.json: no valid JSON"),
        ("r.json", "{}", "a list of objects was expected"),
        ("r.parquet", "PAR0", "cannot be read as Parquet"),
        ("r.txt", "text", "rows are read from .jsonl"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        read_rows(SourceSettings(path=str(tmp_path / name)))


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./nowhere", "/no/such/folder"])
def test_a_missing_file(path: str) -> None:
    with pytest.raises(UserError, match=f"{Path(path)} does not exist"):
        read_rows(SourceSettings(path=path))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no"):
        read_rows(SourceSettings(path=str(tmp_path)))


def test_bad_rows_are_told_by_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n{"prompt": \n[1]\n{"prompt": 3}\n{"prompt": " "}\n{"text": "x"}\n\xff\n')
    rows = read_rows(SourceSettings(path=str(path)))
    parsed = parse_rows(rows, parse_prompt, "skip")
    assert [item.prompt for item in parsed.items] == ["a"]
    expected = (
        ":3: no valid JSON",
        ":4: a list",
        ":5: `prompt` is a number",
        ":6: `prompt` is empty",
        ":7: no `prompt`",
    )
    for reason, skipped in zip((*expected, ":8: no valid JSON"), parsed.skipped, strict=True):
        assert reason in skipped
    with pytest.raises(UserError, match=rf"{path}:3: no valid JSON") as caught:
        parse_rows(rows, parse_prompt, "error")
    assert "… and 1 more bad rows" in str(caught.value)
    assert "on_bad_row=skip" in str(caught.value)


def test_skipping_every_row_is_an_error(tmp_path: Path) -> None:
    rows = read_rows(SourceSettings(path=write(tmp_path, "r.jsonl", [{"x": 1}])))
    with pytest.raises(UserError, match="no good row is left"):
        parse_rows(rows, parse_prompt, "skip")


def test_a_csv_row_with_too_few_or_too_many_cells(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,id\na,1\nb\nc,1,2\n")
    parsed = parse_rows(read_rows(SourceSettings(path=str(tmp_path / "r.csv"))), parse_prompt, "skip")
    assert len(parsed.items) == 1
    assert [text.split(":")[1] for text in parsed.skipped] == ["3", "4"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, Demonstration("p", "c")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Demonstration(CHAT[:1], "Hello")),
        ({"messages": CHAT}, Demonstration(CHAT[:1], "Hello")),
        ({"text": "t"}, Demonstration("", "t")),
        ({"prompt": "p", "completion": "c", "text": "pc"}, Demonstration("p", "c")),
    ],
)
def test_demonstrations_in_every_form(values: dict[str, Any], expected: Demonstration) -> None:
    assert parse_demonstration(values) == expected


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "no `prompt`; the row has no columns"),
        ({"prompt": "p"}, "no `completion`"),
        ({"prompt": "p", "completion": ""}, "`completion` is empty"),
        ({"prompt": "p", "completion": CHAT}, "one message by the assistant"),
        ({"messages": CHAT[:1]}, "one message"),
        ({"messages": CHAT[::-1]}, "by the assistant"),
        ({"messages": [{"role": "user"}, *CHAT]}, "role: text, content: text"),
        ({"messages": "hello"}, "a list of messages was expected"),
        ({"text": 3}, "`text` is a number"),
    ],
)
def test_bad_demonstrations(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_demonstration(values)


def test_other_columns_of_a_prompt_pass_through() -> None:
    row = parse_prompt({"prompt": "p", "answer": "42", "id": 1})
    assert (row.prompt, row.columns) == ("p", {"answer": "42", "id": 1})


@given(keys=st.lists(st.integers(0, 20), min_size=2), share=st.floats(0.05, 0.9), seed=st.integers(0, 9))
def test_a_split_loses_nothing_and_keeps_equal_keys_together(keys: list[int], share: float, seed: int) -> None:
    items = list(enumerate(keys))
    if len(set(keys)) == 1:
        with pytest.raises(ValueError, match="1 different prompts"):
            split_heldout(items, share, seed, key=lambda item: item[1])
        return
    try:
        train, heldout = split_heldout(items, share, seed, key=lambda item: item[1])
    except ValueError:
        assert round(len(set(keys)) * share) >= len(set(keys))
        return
    assert sorted(train + heldout) == items
    assert not {key for _, key in train} & {key for _, key in heldout}
    assert (train, heldout) == split_heldout(items, share, seed, key=lambda item: item[1])
    assert len({key for _, key in heldout}) == max(1, round(len(set(keys)) * share))
