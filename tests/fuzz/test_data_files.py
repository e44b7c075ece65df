"""Damaged data files: each results in rows, with bad ones told from good ones, or in a UserError."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from align.config.schema import SftSettings, SourceSettings
from align.data.examples import demonstration_parser, preference_parser, request_parser
from align.data.parsing import parse_rows
from align.data.readers import read_rows
from policies.errors import UserError
from policies.text.encoder import TextEncoder
from rewards.schema import RewardSettings
from rollouts.schema import RolloutSettings
from tests.fuzz.harm import NOW, altered, confined, damaged, odd_text, odd_value, refusal, run

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: "
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstrations": [
        {"prompt": "a", "completion": "b"},
        {"messages": CHAT},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"text": "all of it"},
    ],
    "preferences": [
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "confidence": 0.9, "tie": False},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "No"}]},
        {"chosen": f"{TRANSCRIPT}yes", "rejected": f"{TRANSCRIPT}no"},
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 2, 2], "ties": "unknown"},
        {"prompt": "a", "responses": ["b", "c"], "best": 1, "attribute": "helpful"},
        {"prompt": "a", "response": "b", "rating": 4},
        {"prompt": "a", "response": "b", "rating": {"helpful": 1, "kind": 2}},
    ],
    "prompts": [{"prompt": "a", "answer": "42"}, {"prompt": CHAT[:1], "id": 7}],
}
FORMATS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
"""The formats that files are written in; their suffix may be that of another format, or none of these."""
SUFFIXES = (*FORMATS, ".json.gz", ".csv.gz", ".txt", "", ".JSONL", ".gz")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    "{{ m.role + ': ' + m.content + m.name | default('') }}\n{% endfor %}"
)


def write(rows: Any, form: str) -> bytes:
    """Rows in a format, without those that it cannot represent."""
    if form == ".json":
        return json.dumps(rows).encode()
    if form.startswith(".jsonl"):
        lines = "".join(json.dumps(row, ensure_ascii=index % 2 == 0) + "\n" for index, row in enumerate(rows))
        content = lines.encode("utf-8", "surrogatepass")
        return gzip.compress(content, mtime=0) if form.endswith(".gz") else content
    objects = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if form == ".csv":
        return _csv(objects)
    return _parquet(objects)


def _column_names(objects: list[dict[str, Any]]) -> list[str]:
    """The names of all objects, in the order in which they first appear."""
    names: dict[str, None] = {}
    for row in objects:
        names |= dict.fromkeys(row)
    return list(names)


def _csv(objects: list[dict[str, Any]]) -> bytes:
    out = io.StringIO(newline="")
    names = _column_names(objects)
    writer = csv.writer(out)
    writer.writerow(names)
    for row in objects:
        cells = [row.get(name, "") for name in names]
        writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _parquet(objects: list[dict[str, Any]]) -> bytes:
    columns: dict[str, pa.Array] = {"when": pa.array([NOW] * len(objects))}
    for name in _column_names(objects):
        values = [row.get(name) for row in objects]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
            columns[name] = pa.array([repr(value)[:100].encode() for value in values])
    out = io.BytesIO()
    try:
        pq.write_table(pa.table({name.encode("utf-8", "replace").decode(): c for name, c in columns.items()}), out)
    except (pa.ArrowException, ValueError):
        pq.write_table(pa.table({"prompt": pa.array([b"\xff", b"a"])}), out)
    return out.getvalue()


@st.composite
def files(draw: st.DrawFn) -> tuple[str, str, bytes, dict[str, str]]:
    """The kind of rows, a file's suffix, its content, and `columns`."""
    kind = draw(st.sampled_from(list(ROWS)))
    rows = draw(altered(draw(st.lists(st.sampled_from(ROWS[kind]), max_size=4)), odd_value))
    form = draw(st.sampled_from(FORMATS))
    content = write(rows, form)
    if draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
    suffix = form if draw(st.integers(0, 5)) else draw(st.sampled_from(SUFFIXES))
    columns = draw(st.dictionaries(st.sampled_from(["prompt", "chosen", "x"]), odd_text, max_size=1))
    return kind, suffix, content, columns if draw(st.integers(0, 5)) == 0 else {}


@pytest.mark.parametrize("examples", [300, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_damaged_file_results_in_rows_or_a_user_error(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, examples: int
) -> None:
    parsers = parsers_of(tiny_tokenizer)

    def check(example: tuple[str, str, bytes, dict[str, str]]) -> None:
        kind, suffix, content, columns = example
        path = tmp_path / f"rows{suffix}"
        path.write_bytes(content)
        source = SourceSettings(path=str(path), columns=columns)
        with confined(tmp_path):
            message = refusal(lambda: parse_rows(read_rows(source), parsers[kind], "skip"))
            assert message is None or str(path) in message
            if message is None:
                rows = read_rows(source)
                parsed = parse_rows(rows, parsers[kind], "skip")
                assert len(parsed.items) + len(parsed.skipped) == len(rows)
                assert all(str(path) in reason for reason in parsed.skipped)
        path.unlink()

    run(check, files(), examples)


def parsers_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Callable[[Any], Any]]:
    """The parser of each kind of row, with a chat template that refuses some conversations."""
    tokenizer_with_template = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer_with_template.chat_template = TEMPLATE
    encoder = TextEncoder(tokenizer_with_template)
    return {
        "demonstrations": demonstration_parser(encoder, SftSettings(), 512),
        "preferences": preference_parser(encoder, RewardSettings(attributes={"helpful": 1.0}, ties="unknown"), 512),
        "prompts": request_parser(encoder, RolloutSettings(max_prompt_tokens=64, max_new_tokens=8), 256),
    }


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("demonstrations", {"prompt": "a\ud800", "completion": "b"}, "`prompt` has half of a surrogate pair"),
        ("demonstrations", {"messages": [CHAT[0], {"role": "assistant", "content": "\udfff"}]}, "surrogate"),
        ("prompts", {"prompt": [{"role": "system", "content": "x"}]}, "chat template fails.*no system prompts"),
        ("prompts", {"prompt": [{"role": "user", "content": "x", "name": 3}]}, "chat template fails"),
        ("preferences", {"prompt": "a", "response": "b", "rating": 10**400}, "`rating` is .*; a number was expected"),
        ("preferences", {"prompt": "a", "responses": "[" * 5000, "best": 0}, "`responses` is text"),
        ("preferences", {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 10**400]}, "a number was expected"),
    ],
)
def test_a_bad_row_is_refused_with_a_reason(
    kind: str, row: dict[str, Any], reason: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=reason):
        parsers_of(tiny_tokenizer)[kind](row)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("r.jsonl.gz", b"no gzip", "r.jsonl.gz:1 cannot be read"),
        ("r.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "cannot be read"),
        ("r.jsonl", b"[" * 100_000, "r.jsonl:1: not valid JSON"),
        ("r.json", b"[" * 100_000, "r.json: not valid JSON"),
        ("r.parquet", b"PAR1" * 9, "r.parquet cannot be read as Parquet"),
    ],
    ids=["no gzip", "cut gzip", "deep line", "deep file", "no parquet"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        parse_rows(read_rows(SourceSettings(path=str(tmp_path / name))), dict, "error")


def test_text_in_parquet_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.utf8(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": broken}), tmp_path / "r.parquet")
    with pytest.raises(UserError, match=r"r\.parquet cannot be read as Parquet"):
        read_rows(SourceSettings(path=str(tmp_path / "r.parquet")))


@pytest.mark.parametrize(
    "path", ["a\0b", "x" * 5000, "./\ud800", "~nobody-here/rows.jsonl", "", "/dev/null", "a/" * 3000]
)
def test_paths_that_no_file_can_have_are_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError), confined(tmp_path):
        read_rows(SourceSettings.model_construct(path=path, columns={}, split="train", limit=None))


def test_folders_and_broken_links_named_like_files_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "real.jsonl").write_text('{"prompt": "a"}\n')
    assert len(read_rows(SourceSettings(path=str(tmp_path)))) == 1
