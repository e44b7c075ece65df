"""How texts end: complete, or with signs that they were cut off."""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable

from align.data.quality.words import folded, words_of

PHRASE_WORDS = 6
"""A shorter text is a phrase, such as `About 12 apples`, which needs no full stop."""
EXPECTED_ENDS = 5.0
"""A word is frequent enough to be judged where it would end so many sentences if all words did alike."""
SELDOM = 0.2
"""A word that ends at most this share of the expected number of sentences seldom ends one."""

FINISHED = re.compile(
    r"""(?:[.!?…。！？।॥؟۔:;]|`{3}|\|)[\s"'”’»)\]}*_`~]*$"""
    r"""|[\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\s*$|(?:https?://|www\.)\S+$"""
)
"""The end of a text: of a sentence, a list's introduction, a code block, a table, an emoji, or a link."""
END_TOKEN = re.compile(r"(?:</?s>|<\|[A-Za-z_]+\|>|<end_of_turn>|<eos>|\[/?(?:EOS|INST|SEP)\])\s*$")
"""The text of a token that ends a response."""
WORD_BEFORE_END = re.compile(r"""([^\W_]+)\s?["”»)\]*_]*\s?[.!?。！？।؟]""")
LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•–]|\d{1,3}[.)])\s[^\n]*\s*\Z", re.MULTILINE)
SIGNATURE = re.compile(r",[ \t]*\r?\n\s*[^\W\da-z][^\n,.]{0,40}\s*\Z")
"""A name below `Best regards,`."""
OPEN_END = re.compile(r"[,(\[{“«„]\s*$")
TAIL = 200
"""So many characters at the end of a text are looked at."""
FUNCTION_WORDS = frozenset(
    words_of(
        "a an the of and or but with from to for at by as if than that because is are was were my your their our his "
        "its el la los las y o de del le les et ou du des un une der die das den dem und oder ein eine einen zu os e um"
    )
)
"""Articles, conjunctions, prepositions and the like of English, Spanish, French, German and Portuguese."""


def is_finished(text: str) -> bool:
    """Whether a text ends as texts do, the tokens at its end aside."""
    tail = text[-TAIL:]
    while token := END_TOKEN.search(tail):
        tail = tail[: token.start()]
    return FINISHED.search(tail) is not None


def has_end_token(text: str) -> bool:
    """Whether a text ends in the text of a token that ends responses."""
    return END_TOKEN.search(text[-TAIL:]) is not None


def is_prose(text: str) -> bool:
    """Whether a full stop is expected: not after a phrase, in a list, or below a letter."""
    if len(text.split(maxsplit=PHRASE_WORDS)) < PHRASE_WORDS:
        return False
    tail = text[-TAIL:]
    return SIGNATURE.search(tail) is None and LIST_ITEM.search(tail) is None


class LastWords:
    """The words of all texts, by which it is told whether one ends in the middle."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Count the words, the last ones of unfinished texts aside, and the words that end sentences."""
        self._words: Counter[str] = Counter()
        self._ends: Counter[str] = Counter()
        for text in texts:
            words = words_of(text)
            self._words.update(words if is_finished(text) else words[:-1])
            self._ends.update(WORD_BEFORE_END.findall(folded(text)))
        self._sorted = sorted(self._words)
        self._end_rate = sum(self._ends.values()) / max(1, sum(self._words.values()))

    def is_cut(self, text: str) -> bool:
        """Whether an unfinished text ends in a part of a word, a function word, or something opened."""
        if OPEN_END.search(text[-TAIL:]) or text.count("```") % 2:
            return True
        if SIGNATURE.search(text[-TAIL:]):
            return False
        word = _last_word(text)
        return word in FUNCTION_WORDS or self._is_part(word)

    def ends_in_rare_end(self, text: str) -> bool:
        """Whether a text ends in a frequent word that ends far fewer sentences than other words do."""
        word = _last_word(text)
        expected = self._words[word] * self._end_rate
        return expected >= EXPECTED_ENDS and self._ends[word] <= SELDOM * expected

    def _is_part(self, word: str) -> bool:
        """Whether a word occurs nowhere else and is the beginning of one that does."""
        if not word.isalpha() or word in self._words:
            return False
        place = bisect_right(self._sorted, word)
        return place < len(self._sorted) and self._sorted[place].startswith(word)


def _last_word(text: str) -> str:
    return (words_of(text[-TAIL:]) or [""])[-1]
