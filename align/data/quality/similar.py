"""Pairs of similar texts in linear time: MinHash signatures (Broder 1997), cut into bands."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
from rensa import RMinHash

from align.data.quality.check import FEWEST_ROWS
from align.data.quality.words import words_of

SIMILAR = 0.8
"""The least Jaccard similarity of near copies, of the pairs of adjacent words in all their parts."""
SIMILAR_PART = 0.6
"""The least similarity of each part: another short response to a long prompt is no near copy."""
BANDS = 21
BAND_ROWS = 6
"""Texts of a similarity of 0.8 share one of 21 bands of 6 values with a probability of 0.998, of 0.4 with 0.08."""
ROWS_AT_ONCE = 4096
"""How many rows have their signatures computed at once."""
SAMPLE = 4096
"""How many rows decide which word pairs are boilerplate."""
BOILERPLATE_SHARE = 0.25
"""A word pair in more of the rows than this is of a template and does not make two rows similar."""

Parts = tuple[str, ...]
"""The texts of a row that are compared with those of another, each with its like."""


def near_copies(rows: Sequence[Parts]) -> dict[int, int]:
    """Find rows that are similar to an earlier one.

    Two rows are similar if they have as many parts, the same numbers in each, and similar words in each and in all.

    Args:
        rows: The texts of each row.

    Returns:
        The index of each such row, with that of an earlier row that it is similar to. Only rows that share a band are
        compared, each with the first one and the one before it in the band, so that the time is linear.
    """
    if len(rows) < 2:
        return {}
    boilerplate = _boilerplate(rows)
    copies: dict[int, int] = {}
    for first, second in _candidates(rows, boilerplate):
        if second not in copies and _are_similar(rows[first], rows[second], boilerplate):
            copies[second] = first
    return copies


def _boilerplate(rows: Sequence[Parts]) -> frozenset[str]:
    """The word pairs of templates, from rows at equal distances."""
    step = max(1, len(rows) // SAMPLE)
    sample = rows[::step]
    if len(sample) < FEWEST_ROWS:
        return frozenset()
    counts: Counter[str] = Counter()
    for parts in sample:
        counts.update(set(_pairs_of(parts)))
    return frozenset(pair for pair, count in counts.items() if count > BOILERPLATE_SHARE * len(sample))


def _candidates(rows: Sequence[Parts], boilerplate: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share a band, by the later one: it with the first of the band, and with the one before it."""
    keys = _band_keys(rows, boilerplate)  # [rows, BANDS]
    codes: list[npt.NDArray[np.int64]] = []
    for band in range(BANDS):
        order = np.argsort(keys[:, band], kind="stable")
        ordered = keys[order, band]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        sizes = np.diff(np.append(starts, len(ordered)))
        first = np.repeat(order[starts], sizes)
        for earlier, later in ((first, order), (order[:-1], order[1:])):
            later_keys = keys[later, band]
            paired = (earlier < later) & (keys[earlier, band] == later_keys)
            codes.append(later[paired].astype(np.int64) * len(rows) + earlier[paired])
    for code in np.unique(np.concatenate(codes)):
        later_row, earlier_row = divmod(int(code), len(rows))
        yield earlier_row, later_row


def _band_keys(rows: Sequence[Parts], boilerplate: frozenset[str]) -> npt.NDArray[np.uint64]:
    """A number for each band of each row's signature: uint64 [rows, BANDS]."""
    multipliers = np.random.default_rng(0).integers(1, 2**63, BAND_ROWS, dtype=np.uint64) | np.uint64(1)
    keys = np.empty((len(rows), BANDS), np.uint64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        shingles = [_shingles(parts, boilerplate) for parts in rows[start : start + ROWS_AT_ONCE]]
        matrix = RMinHash.digest_matrix_from_token_sets(shingles, BANDS * BAND_ROWS, 0)
        signatures = np.array(matrix.to_rows(), np.uint64)  # [chunk, BANDS * BAND_ROWS]
        bands = signatures.reshape(len(shingles), BANDS, BAND_ROWS)
        mixed = (bands + np.uint64(1)) * multipliers  # wraps around, as a hash may
        mixed ^= mixed >> np.uint64(29)
        keys[start : start + ROWS_AT_ONCE] = (mixed * multipliers[::-1]).sum(-1, dtype=np.uint64)
    return keys


def _shingles(parts: Parts, boilerplate: frozenset[str]) -> list[str]:
    """The word pairs of a row that tell it from others, in order; all of them where none does."""
    pairs = list(_pairs_of(parts))
    telling = [pair for pair in pairs if pair not in boilerplate]
    return telling or pairs or [""]


def _pairs_of(parts: Parts) -> Iterator[str]:
    return chain.from_iterable(map(_word_pairs, parts))


def _word_pairs(text: str) -> list[str]:
    """The pairs of adjacent words; the one word, or the text itself, where there are no more."""
    words = words_of(text)
    if len(words) < 2:
        return words or [text.strip()]
    return list(map(" ".join, pairwise(words)))


def _are_similar(first: Parts, second: Parts, boilerplate: frozenset[str]) -> bool:
    if len(first) != len(second):
        return False
    shared = 0
    different = 0
    for each, other in zip(first, second, strict=True):
        if _numbers(each) != _numbers(other):
            return False
        common, unlike = _overlap(each, other, boilerplate)
        if common < SIMILAR_PART * (common + unlike):
            return False
        shared += common
        different += unlike
    return shared >= SIMILAR * (shared + different)


def _overlap(first: str, second: str, boilerplate: frozenset[str]) -> tuple[int, int]:
    """How many word pairs two texts have both, and how many only one of them."""
    pairs = (set(_word_pairs(first)), set(_word_pairs(second)))
    telling = (pairs[0] - boilerplate, pairs[1] - boilerplate)
    if pairs[0] == pairs[1] or not (telling[0] or telling[1]):
        telling = pairs
    return len(telling[0] & telling[1]), len(telling[0] ^ telling[1])


def _numbers(text: str) -> list[str]:
    return sorted(word for word in words_of(text) if any(map(str.isdigit, word)))
