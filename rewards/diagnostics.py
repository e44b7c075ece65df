"""How far to trust a reward model: figures from its scores of held-out preferences. Pure functions."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, combinations, pairwise, product
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.preferences import Pair, PreferenceExample, Ranking, Rating

BINS = 10
"""Number of bins of the reliability diagram, equally wide over confidences from ½ to 1."""


@dataclass(frozen=True)
class Accuracy:
    """Share of held-out comparisons that the scores put in the right order, with its 95 % confidence interval.

    Attributes:
        accuracy: From 0 to 1; NaN for no comparisons.
        accuracy_low: Lower bound of the interval.
        accuracy_high: Upper bound of the interval.
        pairs: Number of comparisons, ties excluded.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    pairs: int


ACCURACY = tuple(field.name for field in fields(Accuracy))
"""The keys of an accuracy in reports."""


@dataclass(frozen=True)
class Comparison:
    """Two responses of which annotators prefer one; each is (index of its example, index of the response in it).

    Attributes:
        better: The preferred response.
        worse: The other one.
        attribute: What they were compared by.
        certainty: The probability that the preference is right.
        margin: The margin that the annotator stated; 0 without one.
    """

    better: tuple[int, int]
    worse: tuple[int, int]
    attribute: str
    certainty: float = 1.0
    margin: float = 0.0

    @property
    def cluster(self) -> int:
        """The example: errors in comparisons of one example are correlated."""
        return self.better[0]


def comparisons(examples: Sequence[PreferenceExample]) -> list[Comparison]:
    """All comparisons that preference examples contain.

    A pair is one, unless it is a tie. A ranking is one for each two responses of different rank. Ratings are compared
    across examples: those of the lower half with those of the upper half, at random and none twice, so that the
    comparisons are independent; equal ratings are left out.

    Args:
        examples: Held-out examples; the result refers to them by index.

    Returns:
        Comparisons of pairs and rankings in the order of the examples, then those of ratings by attribute.
    """
    result: list[Comparison] = []
    rated: dict[str, list[tuple[float, int]]] = {}
    for i, example in enumerate(examples):
        preference = example.preference
        if isinstance(preference, Pair) and preference.certainty > 0.5:
            pair = Comparison(
                better=(i, 0),
                worse=(i, 1),
                attribute=example.attribute,
                certainty=preference.certainty,
                margin=preference.margin,
            )
            result.append(pair)
        elif isinstance(preference, Ranking):
            result += _ranked(i, example.attribute, preference.sizes)
        elif isinstance(preference, Rating):
            for attribute, value in preference.values.items():
                rated.setdefault(attribute, []).append((value, i))
    for attribute, ratings in rated.items():
        result += _rated(ratings, attribute)
    return result


def _ranked(example: int, attribute: str, sizes: Sequence[int]) -> list[Comparison]:
    """A comparison for each two responses of different rank."""
    result: list[Comparison] = []
    ends = [0, *accumulate(sizes)]
    groups = [range(start, end) for start, end in pairwise(ends)]
    for above, below in combinations(groups, 2):
        for better, worse in product(above, below):
            result.append(Comparison((example, better), (example, worse), attribute))
    return result


def _rated(ratings: list[tuple[float, int]], attribute: str) -> list[Comparison]:
    """Comparisons of ratings (value, index of the example), each at most once."""
    random.Random(0).shuffle(ratings)
    ratings.sort(key=lambda rating: rating[0])  # stable, so that equal ratings stay shuffled
    half = len(ratings) // 2
    upper = ratings[half + len(ratings) % 2 :]
    result: list[Comparison] = []
    for (low, worse), (high, better) in zip(ratings, upper, strict=False):
        if low < high:
            result.append(Comparison((better, 0), (worse, 0), attribute))
    return result


def wilson(share: float, count: float, pairs: int | None = None) -> Accuracy:
    """A share of independent trials with its 95 % score interval (Wilson 1927, "Probable inference").

    Args:
        share: The share of successes, from 0 to 1.
        count: Number of independent trials; where trials are correlated, the effective number, which is no integer.
        pairs: Number of actual trials, where it is not `count`.
    """
    pairs = round(count) if pairs is None else pairs
    if count == 0:
        return Accuracy(math.nan, 0.0, 1.0, 0)
    z = 1.959964  # 97.5 % quantile of the standard normal distribution
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half_width = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / scale
    return Accuracy(share, max(0.0, centre - half_width), min(1.0, centre + half_width), pairs)


def accuracy(difference: Tensor, clusters: Sequence[int]) -> Accuracy:
    """Share of positive score differences; zeros count half.

    Errors within a cluster are correlated: the interval is Wilson's for the number of independent comparisons that
    would have the same variance (the design effect; Kish 1965).

    Args:
        difference: Score of the better minus that of the worse response `[M]`.
        clusters: The cluster of each comparison `[M]`.
    """
    right = _right(difference)
    count = len(right)
    if not count:
        return wilson(0.0, 0)
    share = float(right.mean())
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    sums = torch.zeros(len(index), dtype=torch.float64)  # [clusters]
    sums.index_add_(0, torch.tensor([index[cluster] for cluster in clusters]), right - share)
    variance = float(sums.square().sum()) / count**2
    effective = min(count, share * (1 - share) / variance) if variance > 0 else len(index)
    return wilson(share, effective, count)


def _right(difference: Tensor) -> Tensor:
    """`[M]` float64: 1 where the order is right, ½ where the scores are equal, else 0."""
    return (difference > 0).double() + 0.5 * (difference == 0).double()


def log_loss(difference: Tensor, certainty: Tensor) -> float:
    """Mean negative log-likelihood of the preferences, in nats.

    Args:
        difference: Score of the better minus that of the worse response `[M]`; σ of it is the model's probability.
        certainty: The probability that the preference is right `[M]`.
    """
    return float(-(certainty * logsigmoid(difference) + (1 - certainty) * logsigmoid(-difference)).mean())


def brier(difference: Tensor, certainty: Tensor) -> float:
    """Mean squared error of the probabilities (Brier 1950). Arguments as of `log_loss`."""
    return float((difference.sigmoid() - certainty).square().mean())


def reliability(difference: Tensor) -> list[dict[str, float]]:
    """The reliability diagram of the model's probabilities.

    Confidence is the larger of the probabilities of the two orders.

    Args:
        difference: Score of the better minus that of the worse response `[M]`.

    Returns:
        For each bin that is not empty: its mean `confidence`, its `accuracy` and its number of `pairs`.
    """
    confidence = difference.abs().sigmoid()  # [M]
    right = _right(difference)  # [M]
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)  # [M]
    diagram: list[dict[str, float]] = []
    for i in range(BINS):
        members = bins == i
        if members.any():
            entry = {
                "confidence": float(confidence[members].mean()),
                "accuracy": float(right[members].mean()),
                "pairs": int(members.sum()),
            }
            diagram.append(entry)
    return diagram


def calibration_error(diagram: Sequence[Mapping[str, float]]) -> float:
    """Expected calibration error: the mean |confidence - accuracy| of a reliability diagram, weighted by pairs.

    Guo et al. 2017, "On calibration of modern neural networks", eq. 3.
    """
    total = sum(entry["pairs"] for entry in diagram)
    return sum(abs(entry["confidence"] - entry["accuracy"]) * entry["pairs"] for entry in diagram) / total


def accuracy_by(values: Tensor, difference: Tensor, clusters: Sequence[int], parts: int = 5) -> list[dict[str, Any]]:
    """Accuracy in groups of about equal size, by increasing value; equal values are always in the same group.

    Args:
        values: What to group by `[M]` float.
        difference: Score of the better minus that of the worse response `[M]`.
        clusters: The cluster of each comparison `[M]`.
        parts: Number of groups.

    Returns:
        For each group that is not empty: its smallest value `from`, its largest `to`, and the fields of its `Accuracy`.
    """
    edges = values.quantile(torch.linspace(0, 1, parts + 1, dtype=values.dtype)).unique()
    groups = torch.bucketize(values, edges[1:-1], right=True)  # [M]
    table: list[dict[str, Any]] = []
    for i in range(len(edges) - 1 or 1):
        members = (groups == i).nonzero().flatten().tolist()
        if members:
            low = float(values[members].min())
            high = float(values[members].max())
            figures = accuracy(difference[members], [clusters[member] for member in members])
            table.append({"from": low, "to": high, **vars(figures)})
    return table


class LengthModel:
    """A reward that depends on a response's length alone: one worth for each decile of the training lengths."""

    def __init__(self, better: Tensor, worse: Tensor) -> None:
        """Fit the worths by maximum likelihood under the Bradley-Terry model, with a ridge penalty of 1.

        Args:
            better: Lengths of the better responses `[M]`.
            worse: Lengths of the worse responses `[M]`.
        """
        lengths = torch.cat([better, worse]).double()
        self.edges = lengths.quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64)).unique()
        self.worth = torch.zeros(len(self.edges) + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.worth], max_iter=200, line_search_fn="strong_wolfe")
        better_bins = self._bins(better)
        worse_bins = self._bins(worse)

        def loss() -> Tensor:
            optimizer.zero_grad()
            negative_log_likelihood = -logsigmoid(self.worth[better_bins] - self.worth[worse_bins]).sum()
            value = negative_log_likelihood + self.worth.square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)

    def __call__(self, lengths: Tensor) -> Tensor:
        """Worths `[N]` float64 of responses by their lengths `[N]`."""
        return self.worth.detach()[self._bins(lengths)]

    def _bins(self, lengths: Tensor) -> Tensor:
        return torch.bucketize(lengths.double().contiguous(), self.edges, right=True)


def agreement(members: Tensor) -> float:
    """How often two members of an ensemble put a comparison in the same order, as a mean over pairs of members.

    Args:
        members: Score differences `[members, M]`.
    """
    order = members.sign()
    pairs = combinations(range(len(members)), 2)
    return float(torch.stack([(order[i] == order[j]).double().mean() for i, j in pairs]).mean())


def rank_correlation(scores: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; NaN where all scores or all values are equal."""
    return float(spearmanr(scores, values).statistic)


def distribution(scores: Tensor) -> dict[str, float]:
    """Mean, standard deviation (`std`) and quantiles (`q5` is 5 %) of scores `[N]`."""
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = {f"q{round(share * 100)}": float(scores.double().quantile(share)) for share in shares}
    return {"mean": float(scores.mean()), "std": float(scores.std(correction=0)), **quantiles}
