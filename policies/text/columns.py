"""Columns of a data row, checked. Every function raises ValueError with a reason for people."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from policies.text.tokenization import Message, Prompt

Values = Mapping[str, Any]

_HALF = re.compile("[\ud800-\udfff]")


def text(values: Values, name: str) -> str:
    """A column that must be there and be text with something in it."""
    value = present(values, name)
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {kind(value)}; text was expected")
    if not value.strip():
        raise ValueError(f"`{name}` is empty")
    return _whole(value, name)


def prompt(values: Values) -> Prompt:
    """The column `prompt`: text or a list of messages."""
    value = present(values, "prompt")
    return messages(value, "prompt") if isinstance(value, list) else text(values, "prompt")


def messages(value: Any, name: str) -> list[Message]:
    """A list of messages, each with the text columns `role` and `content`."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is {kind(value)}; a list of messages was expected")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"`{name}` has a message that is not {{role: text, content: text}}: {shown(message)}")
        _whole(message["role"], name)
        _whole(message["content"], name)
    return value


def reply(value: Any, name: str) -> str:
    """A response: text, or a list of one message by the assistant."""
    if isinstance(value, str):
        return text({name: value}, name)
    said = messages(value, name)
    if len(said) != 1 or said[0]["role"] != "assistant":
        raise ValueError(f"`{name}` must be text or one message by the assistant")
    return text({name: said[0]["content"]}, name)


def number(values: Values, name: str) -> float:
    """A column with a finite number; text that spells one, as CSV has it, counts."""
    value = present(values, name)
    try:
        result = float("nan") if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        result = float("nan")
    if not abs(result) < float("inf"):
        raise ValueError(f"`{name}` is {shown(value)}; a number was expected")
    return result


def items(values: Values, name: str) -> Any:
    """A column that should hold a list; JSON's text of one, as CSV has it, is read."""
    value = present(values, name)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def numbers(values: Values, name: str) -> list[float]:
    """A column with a list of finite numbers."""
    value = items(values, name)
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {kind(value)}; a list of numbers was expected")
    return [number({f"{name}[{i}]": item}, f"{name}[{i}]") for i, item in enumerate(value)]


def flag(values: Values, name: str) -> bool:
    """A column with yes or no: true, false, 1, 0, or text that spells one of them."""
    value = present(values, name)
    known = {"true": True, "1": True, "false": False, "0": False}
    said = str(value).lower() if isinstance(value, str | int | float) else ""
    if said not in known:
        raise ValueError(f"`{name}` is {shown(value)}; true or false was expected")
    return known[said]


def has(values: Values, name: str) -> bool:
    """Whether a column is there with a value."""
    return values.get(name) is not None


def present(values: Values, name: str) -> Any:
    """A column that must be there with a value."""
    if not has(values, name):
        there = ", ".join(f"`{key}`" for key in values) or "no columns"
        raise ValueError(f"no `{name}`; the row has {there}, and the source's `columns` can rename them")
    return values[name]


def _whole(value: str, name: str) -> str:
    """Text that UTF-8 can hold; JSON's escapes can spell what it cannot."""
    if _HALF.search(value):
        raise ValueError(f"`{name}` has half of a surrogate pair, which is no character: {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deep lists, and numbers too long to spell
        return kind(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)
