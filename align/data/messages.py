"""Messages in rows: JSON text of messages is read as messages, and keys without a value are dropped from them."""

import ast
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from align.data.source_row import SourceRow
from policies.text.columns import RepeatedKey, has, parse_json

COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "response", "responses")
"""The columns that contain text or messages; `responses` is a list of these."""
NESTED = (*COLUMNS, "tools")
"""The columns of objects that a chat template renders."""


def read_messages(rows: Sequence[SourceRow], note: Callable[[str], None]) -> list[SourceRow]:
    """Read the messages of all rows.

    A column whose texts are all JSON lists of messages is read as messages, since CSV and other files of plain text
    cannot hold them otherwise. The column `messages` of demonstrations holds nothing else: there each text is read by
    itself, and one that is not JSON is the problem of its row alone. Keys without a value are dropped from messages
    and tools: Parquet has the same keys in all objects of a column, and chat templates test whether a message has a
    key.

    Args:
        rows: All rows of a source.
        note: Is told which columns are read as messages, and which are not though some of their texts could be.

    Returns:
        The rows. Those whose messages cannot be read have a problem.
    """
    in_json = []
    for name in COLUMNS:
        if _is_messages_in_json(rows, name, note):
            in_json.append(name)
            note(f"`{name}`, JSON text, is read as messages")
    return [_read_row(row, in_json) for row in rows]


def _is_messages_in_json(rows: Sequence[SourceRow], name: str, note: Callable[[str], None]) -> bool:
    """Whether a column has JSON text of messages, and nothing but messages otherwise."""
    if name == "messages" and _are_demonstrations(rows):
        return any(isinstance(row.values.get(name), str) for row in rows)
    texts = 0
    messages = 0
    other: SourceRow | None = None
    for row in rows:
        value = row.values.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if not _could_be_messages(value, name):
            other = other or row
            continue
        messages += 1
        texts += _has_text(value)
    if texts and other:
        filled = sum(row.values.get(name) is not None for row in rows)
        note(f"`{name}` is read as text: {messages} of its {filled} rows are messages in JSON, {other.where} is not")
    return texts > 0 and other is None


def _are_demonstrations(rows: Sequence[SourceRow]) -> bool:
    """Whether `messages`, where a row has it, is its conversation, and not a further column of a prompt or a pair."""
    return not any(has(row.values, "prompt") or has(row.values, "chosen") for row in rows)


def _could_be_messages(value: Any, name: str) -> bool:
    """Whether a value is a list of messages, or JSON text of one; in `responses`, whether all items are."""
    listed = _from_json(value)
    if not isinstance(listed, list) or not listed:
        return False
    if name == "responses":
        return all(_could_be_messages(item, "response") for item in listed)
    return all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in listed)


def _from_json(value: Any) -> Any:
    """A value; a list in text is parsed as JSON where possible, even if a key occurs twice, which `_parsed` reports."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _has_text(value: Any) -> bool:
    return isinstance(value, str) or any(isinstance(item, str) for item in value)


def _read_row(row: SourceRow, in_json: Sequence[str]) -> SourceRow:
    read: dict[str, Any] = {}
    for name in NESTED:
        value = row.values.get(name)
        try:
            if name in in_json:
                value = _parsed(value, name)
            if isinstance(value, list):
                read[name] = _without_nulls(value)
        except (RecursionError, ValueError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            return SourceRow(row.where, problem=f"`{name}`: {reason}")
    return replace(row, values=row.values | read) if read else row


def _parsed(value: Any, name: str) -> Any:
    """A value of a column with JSON text. Raises ValueError where it is not JSON or has a key twice in an object."""
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except RepeatedKey:
            raise
        except ValueError as error:
            notation = "Python's notation, and " if _is_python(value) else ""
            raise ValueError(f"the text is {notation}not JSON: {error}") from None
    if name == "responses" and value is not None:
        return [_parsed(item, "response") for item in value]
    return value


def _is_python(text: str) -> bool:
    """Whether a text is a list as Python prints it, in single quotes, and as pandas writes it to CSV."""
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return isinstance(ast.literal_eval(text), list)
    return False


def _without_nulls(value: Any) -> Any:
    """A JSON value without the keys of its objects, at any depth, that have no value."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
