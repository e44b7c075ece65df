"""Columns of a data row, checked. Every function raises ValueError with a message that says what is wrong."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from policies.text.tokenization import Message, Prompt

Values = Mapping[str, Any]
"""A row: its values by the names of their columns."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can escape and UTF-8 cannot encode."""
MAX_SHOWN = 80
"""Largest number of characters of a value in an error message."""
KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
TRUTH_VALUES = {"true": True, "1": True, "false": False, "0": False}


def text(values: Values, name: str) -> str:
    """The text in a column; it must not be empty."""
    value = present(values, name)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {kind(value)}; text was expected")
    if not value.strip():
        raise ValueError(f"`{name}` is empty")
    return _encodable(value, name)


def prompt(values: Values) -> Prompt:
    """The prompt in the column `prompt`: text or a list of messages."""
    value = present(values, "prompt")
    if isinstance(value, list):
        return messages(value, "prompt")
    return text(values, "prompt")


def messages(value: Any, name: str) -> list[Message]:
    """A list of messages, each with the texts `role` and `content`; name: of the column."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        raise ValueError(f"`{name}` is {found}; a list of messages was expected")
    for message in value:
        is_object = isinstance(message, dict)
        if not is_object or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"`{name}` has a message without the text `role` or the text `content`, which may be empty: "
                f"{shown(message)}"
            )
        _encodable(message["role"], name)
        _encodable(message["content"], name)
    return value


def reply(value: Any, name: str) -> str:
    """A response: text, or a list of one message by the assistant; name: of the column."""
    if isinstance(value, str):
        return text({name: value}, name)
    listed = messages(value, name)
    if len(listed) != 1 or listed[0]["role"] != "assistant":
        raise ValueError(f"`{name}` must be text or one message by the assistant")
    return text({name: listed[0]["content"]}, name)


def tools(values: Values, prompt: Prompt) -> list[dict[str, Any]] | None:
    """The functions in the column `tools`, which the chat template renders with the messages; None without one."""
    if not has(values, "tools"):
        return None
    if isinstance(prompt, str):
        raise ValueError("`tools` needs messages, which a chat template renders; the prompt is plain text")
    listed = items(values, "tools")
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise ValueError(f"`tools` is {shown(listed)}; a list of JSON schemas was expected")
    return listed


def number(values: Values, name: str) -> float:
    """The finite number in a column; text, as in CSV, is converted."""
    value = present(values, name)
    try:
        result = float("nan") if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        result = float("nan")
    if not abs(result) < float("inf"):
        raise ValueError(f"`{name}` is {shown(value)}; a number was expected")
    return result


def items(values: Values, name: str) -> Any:
    """The value in a column that should be a list; text, as in CSV, is parsed as JSON where possible."""
    value = present(values, name)
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except RepeatedKey as error:
        raise ValueError(f"`{name}`: {error}") from None
    except (ValueError, RecursionError):
        return value


class RepeatedKey(ValueError):
    """A key occurs twice in a JSON object: either value could be the one that was meant."""


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object that its keys and values make up; an `object_pairs_hook` of `json`. Raises RepeatedKey."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKey(f"the key {counts.most_common(1)[0][0]!r} occurs twice in one object")
    return values


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, RepeatedKey among them, or RecursionError."""
    return json.loads(text, object_pairs_hook=unique_keys)


def numbers(values: Values, name: str) -> list[float]:
    """The list of finite numbers in a column."""
    value = items(values, name)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {kind(value)}; a list of numbers was expected")
    result: list[float] = []
    for index, item in enumerate(value):
        name_of_item = f"{name}[{index}]"
        result.append(number({name_of_item: item}, name_of_item))
    return result


def flag(values: Values, name: str) -> bool:
    """The truth value in a column: true, false, 1 or 0, or the same as text."""
    value = present(values, name)
    word = str(value).lower() if isinstance(value, str | int | float) else ""
    if word not in TRUTH_VALUES:
        raise ValueError(f"`{name}` is {shown(value)}; true or false was expected")
    return TRUTH_VALUES[word]


def has(values: Values, name: str) -> bool:
    """Whether a row has a column, with a value in it."""
    return values.get(name) is not None


def present(values: Values, name: str) -> Any:
    """The value in a column that the row must have."""
    if not has(values, name):
        columns = ", ".join(f"`{key}`" for key in values) or "no columns"
        raise ValueError(f"no `{name}`; the row has {columns}, and the source's `columns` can rename them")
    return values[name]


def _encodable(value: str, name: str) -> str:
    """The text itself. Raises ValueError where UTF-8 cannot encode it."""
    if SURROGATE.search(value):
        raise ValueError(f"`{name}` has half of a surrogate pair, which is not a character: {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value for an error message, shortened if it is long."""
    try:
        representation = repr(value)
    except (RecursionError, ValueError):  # deep lists, and numbers with too many digits for Python
        return kind(value)
    return representation if len(representation) <= MAX_SHOWN else f"{representation[:MAX_SHOWN]}…"


def kind(value: Any) -> str:
    """The type of a JSON value in words."""
    if value is None:
        return "nothing"
    return KINDS.get(type(value), type(value).__name__)
