"""Texts as words, for comparisons that ignore case, punctuation and white space."""

import re

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]|[^\W_]+(?:['’][^\W_]+)*")
"""A word; in Chinese, Japanese and Korean, which write no spaces, or few, a character."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.casefold())


def normalised(text: str) -> str:
    """A text as its words; as itself without white space at its ends where it has none."""
    return " ".join(words_of(text)) or text.strip()


def unspaced(text: str) -> str:
    """A text with every run of white space as one blank, and none at its ends."""
    return " ".join(text.split())
