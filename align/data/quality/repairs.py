"""Changes to the texts of a row."""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from align.data.quality.characters import CONTROL_CHARACTERS, INVISIBLE, MOJIBAKE, PRIVATE
from align.data.quality.rows import TEXT_COLUMNS
from policies.text.columns import SURROGATE, Values

Change = Callable[[str], str]

REMOVED = re.compile("|".join((CONTROL_CHARACTERS, INVISIBLE, PRIVATE, SURROGATE.pattern)))
MISREAD = re.compile(MOJIBAKE)


def with_texts(columns: Values, change: Change) -> dict[str, Any]:
    """The columns of a row with each of its texts changed."""
    return {name: _changed(value, change) if name in TEXT_COLUMNS else value for name, value in columns.items()}


def _changed(value: Any, change: Change) -> Any:
    """A text, a message or completion, or a list of these, with its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, Mapping):
        texts = {key: change(value[key]) for key in ("content", "value", "response") if isinstance(value.get(key), str)}
        return {**value, **texts}
    return value


def normalised_unicode(text: str) -> str:
    """A text in Unicode's form C: mojibake decoded; control, invisible and private characters, and surrogates removed.

    U+FFFD stays: it does not say which character it stands for.
    """
    if text.isascii() and not REMOVED.search(text):
        return text
    while True:  # text that was misread twice is decoded twice
        decoded = MISREAD.sub(_decoded, text)
        cleaned = unicodedata.normalize("NFC", REMOVED.sub("", decoded))
        if cleaned == text:
            return text
        text = cleaned


def _decoded(match: re.Match[str]) -> str:
    """The characters of UTF-8 that was read in Windows-1252 or Latin-1; the match itself where it is no UTF-8."""
    try:
        return b"".join(map(_byte, match.group())).decode("utf-8")
    except UnicodeError:
        return match.group()


def _byte(character: str) -> bytes:
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")
