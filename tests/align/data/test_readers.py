import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from align.config.schema import SourceSettings
from align.data.parsing import parse_prompt, parse_rows
from align.data.readers import read_rows
from policies.errors import UserError
from rewards.preferences import parse_preference

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": 'b, "c"\nd', "answer": 2}]


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
    with pytest.raises(UserError, match="renames 'question' to 'prompt', and no row has it; columns: prompt, answer"):
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
        ("r.json", "{", "r.json: not valid JSON"),
        ("r.json", "{}", "a list of objects was expected"),
        ("r.parquet", "PAR0", "cannot be read as Parquet"),
        ("r.xlsx", "text", "rows are read from .jsonl"),
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
    with pytest.raises(UserError, match="contains no"):
        read_rows(SourceSettings(path=str(tmp_path)))


def test_a_csv_row_with_too_few_or_too_many_cells(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("prompt,id\na,1\nb\nc,1,2\n")
    parsed = parse_rows(read_rows(SourceSettings(path=str(tmp_path / "r.csv"))), parse_prompt, "skip")
    assert len(parsed.items) == 1
    assert [text.split(":")[1] for text in parsed.skipped] == ["3", "4"]


def test_a_subset_of_local_data_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", ROWS)
    for local in (path, str(tmp_path)):
        with pytest.raises(UserError, match=r"is local, and `subset` names a configuration"):
            read_rows(SourceSettings(path=local, subset="main"))


@pytest.mark.parametrize(
    ("header", "message"),
    [("prompt,id,prompt", "two columns are named 'prompt'"), ("prompt,,", "two columns have no name")],
)
def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f"{header}\na,1,b\n")
    with pytest.raises(UserError) as caught:
        read_rows(SourceSettings(path=str(path)))
    assert str(caught.value) == f"{path}:1: {message}"


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    with pytest.raises(UserError) as caught:
        read_rows(SourceSettings(path=str(path)))
    assert str(caught.value) == f"{path}: two columns are named 'prompt'"


def test_two_fields_of_one_name_in_a_parquet_column_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    twice = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(pa.table({"prompt": twice}), path)
    with pytest.raises(UserError, match=r"r\.parquet cannot be read as Parquet: .*duplicate field names"):
        read_rows(SourceSettings(path=str(path)))


REPEATED = ['{"prompt": "a", "prompt": "b"}', '{"prompt": [{"role": "user", "content": "a", "content": "b"}]}']


@pytest.mark.parametrize("line", REPEATED, ids=["column", "in a message"])
def test_a_json_key_that_occurs_twice_in_a_line_makes_a_bad_row(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    parsed = parse_rows(read_rows(SourceSettings(path=str(path))), parse_prompt, "skip")
    assert len(parsed.items) == 1
    key = "prompt" if line == REPEATED[0] else "content"
    assert parsed.skipped == [f"{path}:2: the key '{key}' occurs twice in one object"]


def test_a_json_key_that_occurs_twice_in_a_list_makes_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(f'[{{"prompt": "fine"}}, {", ".join(REPEATED)}]')
    parsed = parse_rows(read_rows(SourceSettings(path=str(path))), parse_prompt, "skip")
    assert len(parsed.items) == 1
    assert parsed.skipped == [
        f"{path}, row 2: the key 'prompt' occurs twice in one object",
        f"{path}, row 3: the key 'content' occurs twice in one object",
    ]


def test_a_json_key_that_occurs_twice_in_a_csv_cell_makes_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    cell = '"[[{""role"": ""assistant"", ""content"": ""b"", ""content"": ""c""}], ""d""]"'
    good = '"[""b"", ""c""]"'
    path.write_text(f"prompt,responses,best\na,{cell},0\na,{good},0\n")
    parsed = parse_rows(read_rows(SourceSettings(path=str(path))), parse_preference, "skip")
    assert parsed.skipped == [f"{path}:2: `responses`: the key 'content' occurs twice in one object"]


@pytest.mark.parametrize("characters", [131_073, 3_000_000])
def test_a_csv_cell_may_be_of_any_length(tmp_path: Path, characters: int) -> None:
    path = tmp_path / "r.csv"
    path.write_text(f'prompt,page\na,{"x" * characters}\n"b, c",y\n')
    rows = read_rows(SourceSettings(path=str(path)))
    assert [row.values["prompt"] for row in rows] == ["a", "b, c"]
    assert len(rows[0].values["page"]) == characters
