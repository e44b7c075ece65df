"""Rows from files and from the hub: read, renamed, checked one by one, split."""

import csv
import gzip
import json
import random
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from align.config.schema import SourceSettings
from policies.errors import UserError, first_line
from policies.text import columns as fields
from policies.text.tokenization import Prompt

T = TypeVar("T")

SHOWN = 5
"""How many bad rows an error message tells of."""


@dataclass(frozen=True)
class SourceRow:
    """Columns by name, and where they stand: `file:line`. problem: why they could not be read."""

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the response that is wanted."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the other columns of its row for the functions that score responses."""

    prompt: Prompt
    columns: dict[str, Any]


@dataclass(frozen=True)
class ParsedRows(Generic[T]):
    """What the good rows gave, and where and why the others were left out."""

    items: list[T]
    skipped: list[str]


def read_rows(source: SourceSettings) -> list[SourceRow]:
    """All rows of a source, under our names of their columns. Raises UserError where there are none.

    A line that is no JSON object becomes a row with a problem, for `parse_rows` to refuse or to skip.
    """
    rows = list(islice(_rows(source), source.limit))
    if not rows:
        raise UserError(f"{source.path} has no rows")
    for ours, theirs in source.columns.items():
        if not any(theirs in row.values for row in rows):
            known = ", ".join(dict.fromkeys(name for row in rows for name in row.values))
            raise UserError(
                f"{source.path}: `columns` asks for {theirs!r} as {ours!r}, and no row has it; known: {known}"
            )
    return [SourceRow(row.where, _renamed(row.values, source.columns), row.problem) for row in rows]


def parse_rows(
    rows: Iterable[SourceRow], parse: Callable[[Mapping[str, Any]], T], on_bad_row: Literal["error", "skip"]
) -> ParsedRows[T]:
    """Put each row through `parse`, which raises ValueError for a bad one.

    Raises UserError for bad rows unless they are to be skipped, and where no good row is left.
    """
    items: list[T] = []
    skipped: list[str] = []
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            items.append(parse(row.values))
        except ValueError as error:
            skipped.append(f"{row.where}: {error}")
    if skipped and (on_bad_row == "error" or not items):
        more = [f"… and {len(skipped) - SHOWN} more bad rows"] if len(skipped) > SHOWN else []
        hint = ["data.on_bad_row=skip leaves them out"] if items else ["no good row is left"]
        raise UserError("\n".join([*skipped[:SHOWN], *more, *hint]))
    return ParsedRows(items, skipped)


def parse_demonstration(values: Mapping[str, Any]) -> Demonstration:
    """`prompt` + `completion`; or `messages`, the last one by the assistant; or `text`, learned from its beginning."""
    if fields.has(values, "messages"):
        said = fields.messages(values["messages"], "messages")
        if len(said) < 2:
            raise ValueError("`messages` has one message; a prompt and a reply by the assistant were expected")
        return Demonstration(said[:-1], fields.reply(said[-1:], "messages"))
    if fields.has(values, "text") and not fields.has(values, "completion"):
        return Demonstration("", fields.text(values, "text"))
    prompt, completion = fields.prompt(values), fields.present(values, "completion")
    return Demonstration(prompt, fields.reply(completion, "completion"))


def parse_prompt(values: Mapping[str, Any]) -> PromptRow:
    """`prompt`; all other columns pass through."""
    return PromptRow(fields.prompt(values), {name: value for name, value in values.items() if name != "prompt"})


def split_heldout(items: Sequence[T], share: float, seed: int, key: Callable[[T], Hashable]) -> tuple[list[T], list[T]]:
    """Set aside about this share of the items, those with the same key always on the same side.

    Both sides keep the order of the items. Raises ValueError where either would be empty.
    """
    keys = list(dict.fromkeys(map(key, items)))
    random.Random(seed).shuffle(keys)
    aside = set(keys[: max(1, round(len(keys) * share))])
    kept = [item for item in items if key(item) not in aside]
    if not kept or not aside:
        raise ValueError(f"{len(keys)} different prompts cannot be split in two")
    return kept, [item for item in items if key(item) in aside]


def _rows(source: SourceSettings) -> Iterator[SourceRow]:
    for path in [source.path] if isinstance(source.path, str) else source.path:
        yield from _rows_of(path, source.split)


def _rows_of(name: str, split: str) -> Iterator[SourceRow]:
    try:
        path = Path(name).expanduser()
        folder, file_itself = path.is_dir(), path.is_file()
        str(path).encode()
    except (OSError, RuntimeError, ValueError) as error:  # too long, nobody's home, half of a surrogate pair
        raise UserError(f"{name!r} is no path: {error}") from None
    if folder:
        files = sorted(file for file in path.rglob("*") if _reader(file) and file.is_file())
        if not files:
            raise UserError(f"folder {path} holds no {', '.join(READERS)} file")
    elif file_itself:
        files = [path]
    elif not _like_a_hub_name(name):
        raise UserError(f"{path} does not exist")
    else:
        yield from _read_hub(name, split)
        return
    for file in files:
        read = _reader(file)
        if read is None:
            raise UserError(f"{file}: rows are read from {', '.join(READERS)} files")
        try:
            yield from read(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}") from None


def _like_a_hub_name(name: str) -> bool:
    path = Path(name)
    plain = name and "\0" not in name and not name.startswith((".", "/", "~"))
    return bool(plain and len(path.parts) <= 2 and _reader(path) is None and not path.exists())


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    there = {ours: theirs for ours, theirs in columns.items() if theirs in values}
    kept = {name: value for name, value in values.items() if name not in there and name not in there.values()}
    return {ours: values[theirs] for ours, theirs in there.items()} | kept


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(f"{path}:{number}", line)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path}:{number + 1} cannot be read: {error}") from None


def _json_row(where: str, line: bytes) -> SourceRow:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        return SourceRow(where, problem=f"no valid JSON: {error}")
    if not isinstance(value, dict):
        return SourceRow(where, problem=f"{fields.kind(value)}; an object with columns was expected")
    return SourceRow(where, value)


def _read_json(path: Path) -> Iterator[SourceRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no valid JSON: {error}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: a list of objects was expected; a file with one object a line is .jsonl")
    for number, value in enumerate(values, start=1):
        where = f"{path}, row {number}"
        yield (
            SourceRow(where, value)
            if isinstance(value, dict)
            else SourceRow(where, problem=f"{fields.kind(value)}, no object")
        )


def _read_csv(path: Path) -> Iterator[SourceRow]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{where}: no valid CSV: {error}") from None
            if None in values or None in values.values():
                yield SourceRow(
                    where, problem=f"{len(reader.fieldnames or ())} cells were expected, as in the first line"
                )
            else:
                yield SourceRow(where, {name: cell for name, cell in values.items() if cell != ""})


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path}, row {number}", values)
    except (ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _read_hub(name: str, split: str) -> Iterator[SourceRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # a wrong name, no network, a wrong split: each library below has kinds of its own
        reason = first_line(error)
        raise UserError(f"{name} is no file here and cannot be loaded from the hub: {reason}") from None
    for number, values in enumerate(rows, start=1):
        yield SourceRow(f"{name} ({split}), row {number}", values)


READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _reader(path: Path) -> Callable[[Path], Iterator[SourceRow]] | None:
    return next((read for suffix, read in READERS.items() if path.name.endswith(suffix)), None)
