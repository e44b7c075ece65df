"""Whether to trust a reward model: figures from its scores of held-out feedback. Pure functions."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, combinations, pairwise
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.preferences import Pair, PreferenceExample, Ranking, Rating

BINS = 10
"""Of the reliability diagram, over confidences from ½ to 1."""


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out comparisons in the right order, ties left out, with its 95 % interval."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    pairs: int


ACCURACY = tuple(field.name for field in fields(Accuracy))


@dataclass(frozen=True)
class Comparison:
    """Two responses of which one was found better. Each is (row of feedback, its response); cluster: the prompt's row.

    certainty: the probability that the verdict is right. margin: what the annotator gave, else 0.
    """

    better: tuple[int, int]
    worse: tuple[int, int]
    attribute: str
    certainty: float = 1.0
    margin: float = 0.0

    @property
    def cluster(self) -> int:
        return self.better[0]


def comparisons(feedback: Sequence[PreferenceExample]) -> list[Comparison]:
    """All that the feedback compares: a pair once, a ranking each two of different rank; ratings two rows each.

    Of ratings the lower half is paired with the upper half at random, no row twice, so that the pairs are independent;
    those rated alike drop out.
    """
    found: list[Comparison] = []
    rated: dict[str, list[tuple[float, int]]] = {}
    for row, each in enumerate(feedback):
        preference = each.preference
        if isinstance(preference, Pair) and preference.certainty > 0.5:
            found.append(Comparison((row, 0), (row, 1), each.attribute, preference.certainty, preference.margin))
        elif isinstance(preference, Ranking):
            ends = [0, *accumulate(preference.sizes)]
            groups = [range(start, end) for start, end in pairwise(ends)]
            for above, below in combinations(groups, 2):
                found += [Comparison((row, i), (row, j), each.attribute) for i in above for j in below]
        elif isinstance(preference, Rating):
            for attribute, value in preference.values.items():
                rated.setdefault(attribute, []).append((value, row))
    for attribute, rows in rated.items():
        random.Random(0).shuffle(rows)
        rows.sort(key=lambda rated: rated[0])
        half = len(rows) // 2
        for (low, worse), (high, better) in zip(rows, rows[half + len(rows) % 2 :], strict=False):
            if low < high:
                found.append(Comparison((better, 0), (worse, 0), attribute))
    return found


def wilson(share: float, count: float, pairs: int | None = None) -> Accuracy:
    """A share of `count` independent trials with its 95 % score interval (Wilson 1927, "Probable inference").

    pairs: how many there were, where they were not independent and count is what they are worth.
    """
    pairs = round(count) if pairs is None else pairs
    if count == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    z = 1.959964
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return Accuracy(share, max(0.0, centre - half), min(1.0, centre + half), pairs)


def accuracy(difference: Tensor, clusters: Sequence[int]) -> Accuracy:
    """Share of positive differences `[M]`, zeros counted half.

    Comparisons of one cluster go wrong together: the interval is Wilson's at the number of independent ones that would
    have the same variance (the design effect; Kish 1965).
    """
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    count = len(right)
    if not count:
        return wilson(0.0, 0)
    share = float(right.mean())
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = torch.zeros(len(index), dtype=torch.float64)
    sums.index_add_(0, torch.tensor([index[cluster] for cluster in clusters]), right - share)
    variance = float(sums.square().sum()) / count**2
    worth = min(count, share * (1 - share) / variance) if variance > 0 else len(index)
    return wilson(share, worth, count)


def log_loss(difference: Tensor, certainty: Tensor) -> float:
    """Mean negative log-likelihood of the verdicts, in nats, where σ(difference) is the model's probability."""
    return float(-(certainty * logsigmoid(difference) + (1 - certainty) * logsigmoid(-difference)).mean())


def brier(difference: Tensor, certainty: Tensor) -> float:
    """Mean squared error of the probabilities (Brier 1950)."""
    return float((difference.sigmoid() - certainty).square().mean())


def reliability(difference: Tensor) -> list[dict[str, float]]:
    """By confidence, the larger of both probabilities, in bins of equal width: its mean, the share right, the count."""
    confidence = difference.abs().sigmoid()
    right = (difference > 0).double() + 0.5 * (difference == 0).double()
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = []
    for i in range(BINS):
        own = place == i
        if own.any():
            mean, share = float(confidence[own].mean()), float(right[own].mean())
            rows.append({"confidence": mean, "accuracy": share, "pairs": int(own.sum())})
    return rows


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error: the mean gap of a reliability diagram, by count (Guo et al. 2017, eq. 3)."""
    total = sum(row["pairs"] for row in rows)
    return sum(abs(row["confidence"] - row["accuracy"]) * row["pairs"] for row in rows) / total


def accuracy_by(values: Tensor, difference: Tensor, clusters: Sequence[int], parts: int = 5) -> list[dict[str, Any]]:
    """Accuracy in groups of about as many comparisons, by rising value; equal values are never in two groups."""
    edges = values.quantile(torch.linspace(0, 1, parts + 1, dtype=values.dtype)).unique()
    place = torch.bucketize(values, edges[1:-1], right=True)
    rows = []
    for i in range(len(edges) - 1 or 1):
        own = (place == i).nonzero().flatten().tolist()
        if own:
            low, high = float(values[own].min()), float(values[own].max())
            rows.append({"from": low, "to": high, **vars(accuracy(difference[own], [clusters[j] for j in own]))})
    return rows


class LengthModel:
    """A reward that knows a response's length and nothing else: a worth for each tenth of the lengths seen."""

    def __init__(self, better: Tensor, worse: Tensor) -> None:
        """Fitted by Bradley and Terry's likelihood to lengths `[M]` of better and worse responses, ridge penalty 1."""
        lengths = torch.cat([better, worse]).double()
        self.edges = lengths.quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64)).unique()
        self.worth = torch.zeros(len(self.edges) + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.worth], max_iter=200, line_search_fn="strong_wolfe")
        first, second = self._place(better), self._place(worse)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -logsigmoid(self.worth[first] - self.worth[second]).sum() + self.worth.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)

    def __call__(self, lengths: Tensor) -> Tensor:
        """Worths `[N]` float64."""
        return self.worth.detach()[self._place(lengths)]

    def _place(self, lengths: Tensor) -> Tensor:
        return torch.bucketize(lengths.double().contiguous(), self.edges, right=True)


def agreement(members: Tensor) -> float:
    """How often two members of an ensemble put a comparison in the same order; differences `[members, M]`."""
    order = members.sign()
    pairs = combinations(range(len(members)), 2)
    return float(torch.stack([(order[i] == order[j]).double().mean() for i, j in pairs]).mean())


def rank_correlation(scores: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's, ties at their mean rank; nan where all of one side are equal."""
    return float(spearmanr(scores, values).statistic)


def distribution(scores: Tensor) -> dict[str, float]:
    """Mean, deviation and quantiles of scores `[N]`."""
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = {f"q{round(share * 100)}": float(scores.double().quantile(share)) for share in shares}
    return {"mean": float(scores.mean()), "std": float(scores.std(correction=0)), **quantiles}
