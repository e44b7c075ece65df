"""Texts that end in the middle: without the end that most have, or at a length at which many end."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from align.data.quality.check import Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.rows import spoken
from align.data.quality.words import folded, words_of
from align.runtime.wording import counted

FINISHED_SHARE = 0.8
"""Where so many texts end as texts do, the others are looked at."""
CUT_SHARE = 0.5
"""Of texts that were cut, at least so many end in a word that seldom ends a sentence."""
PILE = 5
"""So many texts of one length, and so many times as many as of each length a little below, are cut there."""
BELOW = 0.8
"""How far below the greatest length the lengths are counted for comparison."""

FINISHED = re.compile(
    r"""(?:[.!?…。！？:;]|`{3}|\|)[\s"'”’»)\]}*_`~]*$|[\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\s*$"""
)
"""The end of a text: of a sentence, a list's introduction, a code block, a table, or an emoji."""
END_TOKEN = re.compile(r"(?:</?s>|<\|[A-Za-z_]+\|>|<end_of_turn>|<eos>|\[/?(?:EOS|INST|SEP)\])\s*$")
"""The text of a token that ends a response."""
WORD_BEFORE_END = re.compile(r"""([^\W_]+)\s?["”»)\]*_]*\s?[.!?。！？]""")


def find_cut_off(corpus: Corpus) -> Flagged | None:
    """Rows with a response, or a prompt where there are no responses, that ends in the middle."""
    texts: dict[int, list[str]] = {}
    for index, content in corpus.contents.items():
        written = content.responses or (spoken(content.prompt),)
        filled = [text for text in written if text.strip()]
        if filled:
            texts[index] = filled
    unfinished = _unfinished(texts)
    piled = _piled(texts)
    rows = sorted({*unfinished, *piled})
    if not rows:
        return None
    words = []
    if unfinished:
        words.append(f"{counted(len(unfinished), 'row')} without the end that most have")
    if piled:
        words.append(f"{counted(len(piled), 'row')} cut off at one length")
    is_cut = bool(piled) or _are_cut(texts, unfinished)
    return Flagged(rows, "; ".join(words), "problem" if is_cut else "fact")


def _is_finished(text: str) -> bool:
    """Whether a text ends as texts do, the tokens at its end aside."""
    tail = text[-80:]
    while token := END_TOKEN.search(tail):
        tail = tail[: token.start()]
    return FINISHED.search(tail) is not None


def _has_end_token(text: str) -> bool:
    return END_TOKEN.search(text[-80:]) is not None


def _unfinished(texts: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """The texts without an end by the index of their row; none where too many have none."""
    for is_complete in (_has_end_token, _is_finished):
        without: dict[int, str] = {}
        count = 0
        for index, responses in texts.items():
            count += len(responses)
            for response in responses:
                if not is_complete(response):
                    without[index] = response
        if texts and len(without) <= (1 - FINISHED_SHARE) * len(texts):
            return without
    return {}


def _are_cut(texts: Mapping[int, Sequence[str]], unfinished: Mapping[int, str]) -> bool:
    """Whether most of these texts end in a word that does not end sentences more often than others do.

    In complete texts without a full stop, the last word is of those that sentences end in. In texts that were cut it is
    any word, or a part of one, which occurs nowhere else.
    """
    if not unfinished:
        return False
    words: Counter[str] = Counter()
    last: Counter[str] = Counter()
    for responses in texts.values():
        for response in responses:
            words.update(words_of(response))
            last.update(WORD_BEFORE_END.findall(folded(response)))
    average = sum(last.values()) / max(1, sum(words.values()))
    seldom_last = 0
    for text in unfinished.values():
        word = (words_of(text) or [""])[-1]
        others = words[word] - 1
        # Two occurrences, at the average rate, are added so that one occurrence alone decides little.
        rate = (last[word] + 2 * average) / (others + 2)
        seldom_last += others < 1 or rate <= average
    return seldom_last >= CUT_SHARE * len(unfinished)


def _piled(texts: Mapping[int, Sequence[str]]) -> set[int]:
    """The rows whose texts have the greatest length of all, in characters or words, where far too many have it."""
    piled: set[int] = set()
    for length_of in (len, _count_words):
        lengths = {index: list(map(length_of, responses)) for index, responses in texts.items()}
        counts: Counter[int] = Counter()
        for each in lengths.values():
            counts.update(each)
        longest = max(counts, default=0)
        if _is_pile(counts, longest):
            rows = {index for index, each in lengths.items() if longest in each}
            if _are_mostly_unfinished(texts, rows):
                piled |= rows
    return piled


def _count_words(text: str) -> int:
    return len(text.split())


def _is_pile(counts: Counter[int], longest: int) -> bool:
    start = int(BELOW * longest)
    below = sum(count for length, count in counts.items() if start <= length < longest)
    mean = below / max(1, longest - start)
    return len(counts) > 1 and counts[longest] >= PILE and counts[longest] >= PILE * mean


def _are_mostly_unfinished(texts: Mapping[int, Sequence[str]], rows: set[int]) -> bool:
    """Whether the longest texts of these rows mostly have no end."""
    without = sum(not _is_finished(max(texts[index], key=len)) for index in rows)
    return 2 * without > len(rows)
