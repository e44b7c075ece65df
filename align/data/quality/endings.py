"""Texts that end in the middle: with signs that they were cut off, or at a length at which many end."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

from align.data.quality.check import Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.last_words import LastWords, has_end_token, is_finished, is_prose
from align.data.quality.rows import spoken
from align.runtime.wording import counted

FINISHED_SHARE = 0.8
"""Where fewer texts end as texts do, an end is not usual, and only the longest texts are looked at."""
CUT_SHARE = 1 / 3
"""Of texts that were cut, at least so many end in a part of a word, or in a word that seldom ends a sentence."""
FEWEST_CUT = 3
"""Fewer texts with such an end may be accidents."""
LONGER_SHARE = 0.8
"""Texts that a limit has cut are longer than the others in at least so many of the pairs of one of each."""
PILE = 5
"""So many texts of one length, and so many times as many as of each length a little below, are cut there."""
BELOW = 0.8
"""How far below the greatest length the lengths are counted for comparison."""

Texts = Mapping[int, Sequence[str]]
"""The responses, or the prompt, of each row by its index."""


def find_cut_off(corpus: Corpus) -> Flagged | None:
    """Rows with a response, or a prompt where there are no responses, that ends in the middle."""
    texts: dict[int, list[str]] = {}
    for index, content in corpus.contents.items():
        written = content.responses or (spoken(content.prompt),)
        filled = [text for text in written if text.strip()]
        if filled:
            texts[index] = filled
    unfinished, are_cut = _unfinished(texts, are_prompts=corpus.kind == "prompts")
    piled = _piled(corpus, texts)
    rows = sorted({*unfinished, *piled})
    if not rows:
        return None
    words = []
    if unfinished:
        words.append(f"{counted(len(unfinished), 'row')} without an end")
    if piled:
        words.append(f"{counted(len(piled), 'row')} cut off at one length")
    return Flagged(rows, "; ".join(words), "problem" if piled or are_cut else "fact")


def _unfinished(texts: Texts, are_prompts: bool) -> tuple[set[int], bool]:
    """The rows with a text without an end, and whether these were cut off."""
    listed = list(chain.from_iterable(texts.values()))
    usual = len(texts) * (1 - FINISHED_SHARE)
    with_token = sum(map(has_end_token, listed))
    is_complete = has_end_token if len(listed) - with_token <= usual else is_finished
    without = _without(texts, is_complete)
    last_words = LastWords(listed)
    prose: dict[int, str] = {}
    cut: dict[int, str] = {}
    for index, text in without.items():
        expects_end = not are_prompts and is_prose(text)
        if expects_end:
            prose[index] = text
        if last_words.is_cut(text) or (expects_end and last_words.ends_in_rare_end(text)):
            cut[index] = text
    candidates = without if are_prompts else prose | cut
    are_cut = len(cut) >= max(FEWEST_CUT, CUT_SHARE * len(candidates))
    if len(without) <= usual:
        return set(candidates if are_cut or not are_prompts else cut), are_cut
    if are_cut and _are_longest(texts, without):
        return set(without), True
    return set(), False


def _without(texts: Texts, is_complete: Callable[[str], bool]) -> dict[int, str]:
    """The last incomplete text of each row that has one."""
    without: dict[int, str] = {}
    for index, responses in texts.items():
        for response in responses:
            if not is_complete(response):
                without[index] = response
    return without


def _are_longest(texts: Texts, unfinished: Mapping[int, str]) -> bool:
    """Whether the unfinished texts are longer than those of the other rows (Mann and Whitney 1947)."""
    complete = chain.from_iterable(responses for index, responses in texts.items() if index not in unfinished)
    lengths = sorted(map(len, complete))
    longer = 0.0
    for text in unfinished.values():
        longer += (bisect_left(lengths, len(text)) + bisect_right(lengths, len(text))) / 2
    return bool(lengths) and longer >= LONGER_SHARE * len(lengths) * len(unfinished)


def _piled(corpus: Corpus, texts: Texts) -> set[int]:
    """The rows whose texts have the greatest length of all, where far too many have it."""
    piled: set[int] = set()
    for lengths in _lengths(corpus, texts):
        counts = Counter(chain.from_iterable(lengths.values()))
        longest = max(counts, default=0)
        if _is_pile(counts, longest):
            rows = {index for index, each in lengths.items() if longest in each}
            if _are_mostly_unfinished(texts, rows):
                piled |= rows
    return piled


def _lengths(corpus: Corpus, texts: Texts) -> list[dict[int, Sequence[int]]]:
    """The lengths of the texts in characters, in words and, with a model, in tokens."""
    measured: list[dict[int, Sequence[int]]] = []
    for length_of in (len, _count_words):
        measured.append({index: list(map(length_of, responses)) for index, responses in texts.items()})
    if corpus.encoder:
        rendered = {index: length for index, length in corpus.lengths.items() if index in texts}
        measured.append({index: length.responses or (length.prompt,) for index, length in rendered.items()})
    return measured


def _count_words(text: str) -> int:
    return len(text.split())


def _is_pile(counts: Counter[int], longest: int) -> bool:
    start = int(BELOW * longest)
    below = sum(count for length, count in counts.items() if start <= length < longest)
    mean = below / max(1, longest - start)
    return len(counts) > 1 and counts[longest] >= PILE and counts[longest] >= PILE * mean


def _are_mostly_unfinished(texts: Texts, rows: set[int]) -> bool:
    """Whether the longest texts of these rows mostly have no end."""
    without = sum(not is_finished(max(texts[index], key=len)) for index in rows)
    return 2 * without > len(rows)
