"""Texts as words, for comparisons that ignore case, punctuation and white space."""

import re

SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
"""Characters of scripts that write no spaces, or few."""
WORD = re.compile(SPACELESS.pattern + r"|[^\W_]+")
"""A word; in Chinese, Japanese and Korean, a character."""
APOSTROPHES = str.maketrans("", "", "'’")
BLANKS = str.maketrans({chr(code): " " for code in range(128) if not chr(code).isalnum()})
"""Blanks in place of what is no letter or digit of ASCII."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    plain = folded(text)
    return plain.translate(BLANKS).split() if plain.isascii() else WORD.findall(plain)


def folded(text: str) -> str:
    """A text in lower case and without apostrophes."""
    return text.casefold().translate(APOSTROPHES)


def count_words(text: str) -> int:
    """The number of words between white space; where there are characters that are words, of those of `words_of`."""
    return len(words_of(text) if SPACELESS.search(text) else text.split())


def normalised(text: str) -> str:
    """A text as its words; as itself without white space at its ends where it has none."""
    return " ".join(words_of(text)) or text.strip()


def unspaced(text: str) -> str:
    """A text with every run of white space as one blank, and none at its ends."""
    return " ".join(text.split())
