"""Texts as words, for comparisons that ignore case, punctuation and white space."""

import re

SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
"""Characters of scripts that write no spaces, or few."""
WORD = re.compile(SPACELESS.pattern + r"|[^\W_]+")
"""A word; in Chinese, Japanese and Korean, a character."""
LONGEST_WORD = 20
"""Characters of a word; what is longer, such as a link or a picture in base64, is as long as several."""
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
    """The length of a text in words.

    A run of characters without white space counts as one word for each `LONGEST_WORD` characters or part of them. Where
    there are characters that are words, the words are those of `words_of`.
    """
    words = words_of(text) if SPACELESS.search(text) else text.split()
    return sum(-(-len(word) // LONGEST_WORD) for word in words)


def normalised(text: str) -> str:
    """A text as its words; as itself without white space at its ends where it has none."""
    return " ".join(words_of(text)) or text.strip()


def unspaced(text: str) -> str:
    """A text with every run of white space as one blank, and none at its ends."""
    return " ".join(text.split())
