"""Passages, and their ranking against BM25 as it is written down."""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.schema import RetrievalSettings
from align.evaluation.retrieval import PassageIndex, build_index, split_passages
from policies.errors import UserError

K1, B = 1.5, 0.75
WORDS = ("cat", "dog", "mat", "door", "blue", "red", "tree", "house")


def bm25(query: str, passages: list[str]) -> list[float]:
    """Robertson and Zaragoza 2009, eq. 3.15, with Lucene's inverse document frequency."""
    documents = [Counter(re.findall(r"\w\w+", passage.lower())) for passage in passages]
    mean_length = sum(document.total() for document in documents) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in re.findall(r"\w\w+", query.lower()):
            holders = sum(word in other for other in documents)
            inverse = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            saturation = K1 * (1 - B + B * document.total() / mean_length)
            score += inverse * document[word] / (document[word] + saturation)
        scores.append(score)
    return scores


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


@given(st.lists(texts, min_size=1, max_size=8), texts, st.integers(1, 9))
def test_the_passages_with_the_highest_bm25_come_first(passages: list[str], query: str, count: int) -> None:
    query = " ".join(dict.fromkeys(query.split()))
    expected = sorted((score for score in bm25(query, passages) if score > 0), reverse=True)[:count]
    found = PassageIndex(passages).best(query, count)
    score_of = dict(zip(passages, bm25(query, passages), strict=True))
    assert [score_of[passage] for passage in found] == pytest.approx(expected, abs=1e-5)


def test_no_passage_fits_a_prompt_without_its_words() -> None:
    assert PassageIndex(["cat dog", "red door"]).best("house", 2) == []
    assert PassageIndex(["cat dog", "red door"]).best("", 2) == []


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 6))
def test_passages_hold_all_words_in_order_and_none_is_too_long(text: str, words: int) -> None:
    passages = list(split_passages(text, words))
    assert " ".join(passages).split() == text.split()
    assert all(1 <= len(passage.split()) <= words for passage in passages)


def test_short_paragraphs_share_a_passage() -> None:
    assert list(split_passages("One two.\n\nThree.\n\n\nFour five six seven.", 4)) == [
        "One two.\n\nThree.",
        "Four five six seven.",
    ]


def test_documents_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: a document needs the column `text`"):
        build_index(RetrievalSettings(documents=str(tmp_path / "rows.jsonl")))
    (tmp_path / "empty.txt").write_text("the - .")
    with pytest.raises(UserError, match="no words"):
        build_index(RetrievalSettings(documents=str(tmp_path / "empty.txt")))
