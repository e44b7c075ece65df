"""Finds the passages of documents that fit a prompt best, by their words (BM25)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from align.config.schema import RetrievalSettings, SourceSettings
from align.data.readers import read_rows
from policies.errors import UserError


class PassageIndex:
    """An index of passages, searched by BM25 (Robertson and Zaragoza 2009) as Lucene computes it.

    Words are compared in lower case; the most frequent English ones, such as `the`, do not count.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        """Index passages, at least one.

        Raises:
            UserError: bm25s is not installed, or no passage has a word that counts.
        """
        try:
            import bm25s
        except ImportError:
            raise UserError("retrieval needs bm25s: pip install 'align-rlhf[retrieval]'") from None
        self.passages = passages
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25(method="lucene")
        words = bm25s.tokenize(list(passages), show_progress=False)
        if not words.vocab:
            raise UserError("retrieval: the documents have no words")
        self._index.index(words, show_progress=False)

    def best(self, query: str, count: int) -> list[str]:
        """The passages that fit a query best, best first: at most `count`, and none that shares no word with it."""
        words = self._tokenize([query], return_ids=False, show_progress=False)
        places, scores = self._index.retrieve(words, k=min(count, len(self.passages)), show_progress=False)
        ranked = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [self.passages[place] for place, score in ranked if score > 0]


def build_index(settings: RetrievalSettings) -> PassageIndex:
    """Read the documents of the settings and index their passages.

    Raises:
        UserError: The documents cannot be read, or a row has no text.
    """
    rows = read_rows(SourceSettings(path=settings.documents))
    for row in rows:
        if row.problem or not isinstance(row.values.get("text"), str):
            raise UserError(f"{row.where}: {row.problem or 'a document needs the column `text`'}")
    return PassageIndex(list(chain.from_iterable(split_passages(row.values["text"], settings.words) for row in rows)))


def split_passages(text: str, words: int) -> Iterator[str]:
    """Passages of at most this many words.

    Consecutive paragraphs, which blank lines separate, share a passage while they fit; a longer paragraph is cut
    between words.
    """
    passage: list[str] = []
    length = 0
    for paragraph in chain.from_iterable(_cut(part, words) for part in text.split("\n\n")):
        added = len(paragraph.split())
        if passage and length + added > words:
            yield "\n\n".join(passage)
            passage, length = [], 0
        passage.append(paragraph)
        length += added
    if passage:
        yield "\n\n".join(passage)


def _cut(paragraph: str, words: int) -> Iterable[str]:
    """A paragraph, or its pieces of at most this many words; nothing of an empty one."""
    parts = paragraph.split()
    if len(parts) <= words:
        return [paragraph.strip()] if parts else []
    return [" ".join(parts[start : start + words]) for start in range(0, len(parts), words)]
