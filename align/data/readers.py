"""Reads rows from files, folders and the hub, and renames their columns."""

import csv
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from align.config.schema import SourceSettings, columns_in
from align.data.messages import read_messages
from align.data.source_row import SourceRow
from policies.errors import UserError, first_line
from policies.text.columns import RepeatedKey, kind, parse_json, unique_keys

DOCUMENTS = (".txt", ".md")
"""Suffixes of files that are one row each."""


def read_rows(source: SourceSettings, note: Callable[[str], None] = lambda text: None) -> list[SourceRow]:
    """Read all rows of a source.

    Args:
        source: Path or hub name, the columns to rename, and how many rows to read.
        note: Is told which columns of JSON text are read as messages.

    Returns:
        The rows, in order, with renamed columns, see also `read_messages`. A line that is not a JSON object becomes a
        row with a problem, which `parse_rows` refuses or skips.

    Raises:
        UserError: The source cannot be read or has no rows, two of its columns have one name, or no row has a column
            that is to be renamed.
    """
    rows = list(islice(_rows(source), source.limit))
    if not rows:
        raise UserError(f"{source.path} has no rows")
    _check_columns(rows, source)
    renamed = [replace(row, values=_renamed(row.values, source.columns)) for row in rows]
    rows = read_messages(renamed, note)
    if source.template is None:
        return rows
    return [_with_template(row, source.template) for row in rows]


def _with_template(row: SourceRow, template: str) -> SourceRow:
    """The row with the prompt that a template makes of its columns."""
    if row.problem:
        return row
    missing = [name for name in columns_in(template) if not isinstance(row.values.get(name), str)]
    if missing:
        return SourceRow(row.where, problem=f"`template` needs the text `{missing[0]}`, which the row lacks")
    return replace(row, values=row.values | {"prompt": template.format_map(row.values)})


def _check_columns(rows: list[SourceRow], source: SourceSettings) -> None:
    for new_name, name in source.columns.items():
        if not any(name in row.values for row in rows):
            names: dict[str, None] = {}  # a set that keeps the order
            for row in rows:
                names |= dict.fromkeys(row.values)
            raise UserError(
                f"{source.path}: `columns` renames {name!r} to {new_name!r}, and no row has it; "
                f"columns: {', '.join(names)}"
            )


def _rows(source: SourceSettings) -> Iterator[SourceRow]:
    for path in [source.path] if isinstance(source.path, str) else source.path:
        yield from _rows_at(path, source.subset, source.split)


def _rows_at(name: str, subset: str | None, split: str) -> Iterator[SourceRow]:
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
        is_file = path.is_file()
        str(path).encode()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown user's home, lone surrogate
        raise UserError(f"{name!r} is not a path: {error}") from None
    if is_folder:
        files = _files_in(path)
    elif is_file:
        files = [path]
    elif _may_be_on_the_hub(name):
        yield from _read_hub(name, subset, split)
        return
    else:
        raise UserError(f"{path} does not exist")
    if subset is not None:
        raise UserError(f"{path} is local, and `subset` names a configuration of a dataset on the hub: remove it")
    for file in files:
        read = _reader(file)
        if read is None:
            raise UserError(f"{file}: rows are read from {', '.join(READERS)} files")
        try:
            yield from read(file)
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}") from None


def _files_in(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if _reader(file) and file.is_file())
    if not files:
        raise UserError(f"folder {folder} contains no {', '.join(READERS)} file")
    tables = [file for file in files if file.suffix not in DOCUMENTS]
    return tables or files  # documents beside tables are about them, such as README.md


def _may_be_on_the_hub(name: str) -> bool:
    path = Path(name)
    is_plain = name and "\0" not in name and not name.startswith((".", "/", "~"))
    return bool(is_plain and len(path.parts) <= 2 and _reader(path) is None and not path.exists())


def _renamed(values: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The renamed columns, then the others. A column that already had the new name of another is dropped."""
    renamed = {new_name: name for new_name, name in columns.items() if name in values}
    replaced = {*renamed, *renamed.values()}
    kept = {name: value for name, value in values.items() if name not in replaced}
    return {new_name: values[name] for new_name, name in renamed.items()} | kept


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
        value = parse_json(line.decode("utf-8-sig"))
    except RepeatedKey as error:
        return SourceRow(where, problem=str(error))
    except (ValueError, RecursionError) as error:
        return SourceRow(where, problem=f"not valid JSON: {error}")
    if not isinstance(value, dict):
        return SourceRow(where, problem=f"{kind(value)}; an object with columns was expected")
    return SourceRow(where, value)


def _read_json(path: Path) -> Iterator[SourceRow]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, list) or isinstance(values, _Pairs):
        raise UserError(f"{path}: a list of objects was expected; a file with one object per line is .jsonl")
    for number, value in enumerate(values, start=1):
        where = f"{path}, row {number}"
        if not isinstance(value, _Pairs):
            yield SourceRow(where, problem=f"{kind(value)}; an object was expected")
            continue
        try:
            yield SourceRow(where, _with_objects(value))
        except (RecursionError, RepeatedKey) as error:
            yield SourceRow(where, problem=str(error))


class _Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object, which may repeat keys."""


def _with_objects(value: Any) -> Any:
    """A value with objects in place of pairs. Raises RepeatedKey."""
    if isinstance(value, _Pairs):
        return unique_keys([(key, _with_objects(item)) for key, item in value])
    if isinstance(value, list):
        return [_with_objects(item) for item in value]
    return value


def _read_csv(path: Path) -> Iterator[SourceRow]:
    csv.field_size_limit(sys.maxsize)  # of all readers in the process; 131,072 characters by default
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{lines.line_num + 1}"
            try:
                cells = next(lines)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{where}: not valid CSV: {error}") from None
            if header is None:
                header = cells
                _check_names(header, where)
            elif cells:  # the line is not blank
                yield _csv_row(where, header, cells)


def _csv_row(where: str, header: list[str], cells: list[str]) -> SourceRow:
    if len(cells) != len(header):
        return SourceRow(where, problem=f"expected {len(header)} cells, as in the header")
    return SourceRow(where, {name: cell for name, cell in zip(header, cells, strict=True) if cell})


def _check_names(names: Sequence[str], where: object) -> None:
    """Refuse columns of one name: a row would have the last of them only."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"{where}: two columns " + (f"are named {name!r}" if name else "have no name"))


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path)
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(f"{path}, row {number}", values)
    except (ArrowException, OSError, OverflowError, ValueError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _read_hub(name: str, subset: str | None, split: str) -> Iterator[SourceRow]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # wrong name, subset or split, no network: each library has exceptions of its own
        reason = first_line(error)
        raise UserError(f"{name} is not a local file and cannot be loaded from the hub: {reason}") from None
    for number, values in enumerate(rows, start=1):
        yield SourceRow(f"{name} ({split}), row {number}", values)


def _read_text(path: Path) -> Iterator[SourceRow]:
    """A document as one row."""
    try:
        yield SourceRow(str(path), {"text": path.read_text(encoding="utf-8-sig")})
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
"""The reader of each kind of file, by the suffix of its name."""


def _reader(path: Path) -> Callable[[Path], Iterator[SourceRow]] | None:
    return next((read for suffix, read in READERS.items() if path.name.endswith(suffix)), None)
