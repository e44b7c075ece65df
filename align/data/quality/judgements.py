"""What preferences and labels say together: contradictions, length bias and imbalance."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import spearmanr

from align.data.quality.check import FEWEST_ROWS, FaultSeverity, Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.rows import Content, spoken
from align.data.quality.words import unspaced
from align.runtime.wording import counted
from policies.text.columns import has
from rewards.diagnostics import wilson
from rewards.preferences import Pair, Ranking, Rating

BIAS = 0.1
"""By how much the interval of the share must miss one half."""
CORRELATION = 0.3
"""The rank correlation of ratings and lengths that its interval must exceed."""
DOMINANT_SHARE = 0.8
"""A value that so many rows have leaves little to learn."""
TIE_SHARE = 0.5
"""Where so many rows are ties, little is compared."""
MOST_LABELS = 20
"""A column with more values is no label."""
JUDGED = ("label", "labels", "rating", "tie", "best")
"""Columns whose values are counted."""


def find_contradictions(corpus: Corpus) -> Flagged | None:
    """Rows whose preferences cannot all be right: they make a cycle, the shortest being two opposite orders."""
    nodes: dict[Hashable, int] = {}
    edges: list[tuple[int, int, int]] = []
    for index, content in corpus.contents.items():
        responses = [unspaced(response) for response in content.responses]
        if len(set(responses)) < len(responses):
            continue  # a row that contradicts itself is a finding of its own
        prompt = unspaced(spoken(content.prompt))
        for better, worse in _ordered(replace(content, responses=tuple(responses))):
            pair = [(prompt, content.attribute, response) for response in (better, worse)]
            winner, loser = (nodes.setdefault(hash(node), len(nodes)) for node in pair)
            edges.append((winner, loser, index))
    if not edges:
        return None
    winners, losers, indices = np.array(edges).T  # [comparisons] each
    graph = coo_array((np.ones(len(edges)), (winners, losers)), shape=(len(nodes), len(nodes)))
    # In a strongly connected component, each response is preferred to each other one, directly or through others.
    _, component = connected_components(graph, directed=True, connection="strong")
    rows = sorted(set(indices[component[winners] == component[losers]].tolist()))
    if not rows:
        return None
    return Flagged(rows, f"{counted(len(rows), 'row')} in contradiction to others about the same responses to a prompt")


def _ordered(content: Content) -> Iterator[tuple[str, str]]:
    """Pairs of responses of which the first is better: each of a group of equals with each of the next group."""
    preference = content.preference
    if isinstance(preference, Pair) and preference.certainty > 0.5:
        yield content.responses[0], content.responses[1]
    if isinstance(preference, Ranking):
        start = 0
        for size, following in zip(preference.sizes, preference.sizes[1:], strict=False):
            middle = start + size
            for better in content.responses[start:middle]:
                for worse in content.responses[middle : middle + following]:
                    yield better, worse
            start = middle


def find_length_bias(corpus: Corpus) -> Flagged | None:
    """Whether the longer response is preferred, or the shorter one, by far more often than not."""
    rated = {index: content for index, content in corpus.contents.items() if isinstance(content.preference, Rating)}
    if rated:
        return _bias_of_ratings(corpus, rated)
    longer: list[int] = []
    shorter: list[int] = []
    for index, content in corpus.contents.items():
        if index in corpus.lengths and any(True for _ in _ordered(content)):
            lengths = corpus.lengths[index].responses
            if lengths[0] != lengths[-1]:
                (longer if lengths[0] > lengths[-1] else shorter).append(index)
    pairs = len(longer) + len(shorter)
    if not pairs:
        return None
    share = wilson(len(longer) / pairs, pairs)
    interval = f"95 % interval {share.accuracy_low:.0%} to {share.accuracy_high:.0%}"
    found = f"the longer response is preferred in {share.accuracy:.0%} of {pairs:,} pairs ({interval})"
    is_biased = share.accuracy_low > 0.5 + BIAS or share.accuracy_high < 0.5 - BIAS
    rows = longer if share.accuracy >= 0.5 else shorter
    return Flagged(rows, found, "problem" if is_biased else "fact", count=len(longer), of=pairs)


def _bias_of_ratings(corpus: Corpus, rated: Mapping[int, Content]) -> Flagged | None:
    indices = [index for index in rated if index in corpus.lengths]
    ratings: list[float] = []
    for index in indices:
        preference = rated[index].preference
        assert isinstance(preference, Rating)
        ratings.append(float(np.mean(list(preference.values.values()))))
    lengths = [corpus.lengths[index].responses[0] for index in indices]
    if len(indices) < FEWEST_ROWS or len(set(ratings)) < 2 or len(set(lengths)) < 2:
        return None
    correlation = float(spearmanr(ratings, lengths).statistic)
    # Fisher's transformation, with the variance of Bonett and Wright (2000) for ranks.
    width = 1.96 * np.sqrt((1 + correlation**2 / 2) / (len(indices) - 3))
    nearest = np.tanh(np.arctanh(min(abs(correlation), 0.999999)) - width)
    found = f"ratings and lengths of {counted(len(indices), 'response')} have a rank correlation of {correlation:.2f}"
    return Flagged(indices, found, "problem" if nearest > CORRELATION else "fact")


def find_label_imbalance(corpus: Corpus) -> Flagged | None:
    """The distribution of labels, ratings, ties and choices; a problem where nearly all rows have one value."""
    by_value: dict[str, dict[str, list[int]]] = {}
    for index, row in enumerate(corpus.rows):
        for name in JUDGED:
            if has(row.columns, name):
                for label, value in _labels(name, row.columns[name]):
                    by_value.setdefault(label, {}).setdefault(value, []).append(index)
    worst: Flagged | None = None
    for name, rows in by_value.items():
        flagged = _imbalance(name, rows, len(corpus.rows))
        if flagged and (worst is None or (flagged.severity == "problem" and worst.severity == "fact")):
            worst = flagged
    return worst


def _labels(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The name and value of a label; of each attribute where it is an object."""
    if isinstance(value, Mapping):
        for attribute, each in value.items():
            yield from _labels(f"{name}.{attribute}", each)
    elif isinstance(value, bool | int | float | str):
        yield name, str(value).strip().lower()


def _imbalance(name: str, rows: Mapping[str, list[int]], total: int) -> Flagged | None:
    counts = Counter({value: len(indices) for value, indices in rows.items()})
    count = counts.total()
    value, most = counts.most_common(1)[0]
    if count < FEWEST_ROWS or len(counts) > MOST_LABELS:
        return None
    if name == "tie":
        ties = [*rows.get("true", []), *rows.get("1", [])]
        found = f"{len(ties):,} of {counted(total, 'row')} are ties"
        severity: FaultSeverity = "problem" if len(ties) >= TIE_SHARE * total else "fact"
        return Flagged(sorted(ties), found, severity, count=len(ties), of=total) if ties else None
    shares = ", ".join(f"{each} {number / count:.0%}" for each, number in counts.most_common(5))
    is_dominant = most >= DOMINANT_SHARE * count
    return Flagged(rows[value], f"`{name}`: {shares}", "problem" if is_dominant else "fact", count=most, of=count)
