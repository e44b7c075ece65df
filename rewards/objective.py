"""What a reward model is trained on: the negative log-likelihood of feedback of every kind, given its scores."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import fmean, pstdev
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rewards.losses import bradley_terry_loss, ordinal_loss, regression_loss
from rewards.preferences import OVERALL, Pair, PreferenceExample, Ranking, Rating
from rewards.rankings import davidson_luce_loss, open_ranking_loss, plackett_luce_loss

Ratings = Literal["regression", "ordinal"]


class PreferenceLoss(nn.Module):
    """Losses of feedback rows, in nats, and what links scores to verdicts besides the scores themselves.

    Learned with the model: how readily annotators call a tie (`Ties`), and how a rating goes with a score (`Line` or
    `Steps`, for each attribute that is rated). None of it is of use to a reward afterwards.
    """

    def __init__(self, feedback: Sequence[PreferenceExample], weights: Mapping[str, float], ratings: Ratings) -> None:
        """feedback: of training, from which the links take their start. weights: of attributes in the whole score."""
        super().__init__()
        self.columns = {name: i for i, name in enumerate(weights)}
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([*weights.values()]), persistent=False)
        self.ties = Ties([f.preference for f in feedback if isinstance(f.preference, Ranking)])
        rated: dict[str, list[float]] = {}
        for preference in (f.preference for f in feedback if isinstance(f.preference, Rating)):
            for name, value in preference.values.items():
                rated.setdefault(name, []).append(value)
        link = {"regression": Line, "ordinal": Steps}[ratings]
        self._names = {name: f"of {name}" if name else "overall" for name in rated}  # a module's name is not empty
        self.links = nn.ModuleDict({self._names[name]: link(values) for name, values in rated.items()})

    def forward(self, scores: Tensor, feedback: Sequence[PreferenceExample], smoothing: float = 0.0) -> Tensor:
        """scores: `[N, A]` by attribute, of the responses of all rows in their order. Result: `[rows]`.

        smoothing: the share of comparisons that are taken to be the reverse of the truth.
        """
        places: dict[tuple[object, ...], list[int]] = {}
        for row, each in enumerate(feedback):
            places.setdefault(_kind(each), []).append(row)
        starts = list(accumulate((len(each.responses) for each in feedback), initial=0))
        losses = scores.new_zeros(len(feedback))
        for rows in places.values():
            alike = [feedback[row] for row in rows]
            count = len(alike[0].responses)
            index = torch.tensor([range(starts[row], starts[row] + count) for row in rows], device=scores.device)
            of_kind = self._of_kind(scores[index], alike, smoothing)
            losses = losses.index_add(0, torch.tensor(rows, device=scores.device), of_kind)
        return losses

    def score(self, scores: Tensor, attribute: str) -> Tensor:
        """From scores `[..., A]` by attribute to those `[...]` of one, or of the whole."""
        return scores @ self.weights if attribute == OVERALL else scores[..., self.columns[attribute]]

    def _of_kind(self, scores: Tensor, alike: Sequence[PreferenceExample], smoothing: float) -> Tensor:
        """Losses `[G]` of rows of one kind; scores `[G, K, A]`."""
        preferences = [each.preference for each in alike]
        if ratings := [preference for preference in preferences if isinstance(preference, Rating)]:
            loss = scores.new_zeros(len(alike))
            for name in ratings[0].values:
                loss = loss + self._ratings(scores[:, 0], name, [rating.values[name] for rating in ratings])
            return loss
        of = self.score(scores, alike[0].attribute)
        if pairs := [preference for preference in preferences if isinstance(preference, Pair)]:
            margin = of.new_tensor([pair.margin for pair in pairs])
            certainty = of.new_tensor([pair.certainty for pair in pairs])
            right = certainty * (1 - smoothing) + (1 - certainty) * smoothing
            return bradley_terry_loss(of[:, 0], of[:, 1], margin, right)
        (ranking,) = {preference for preference in preferences if isinstance(preference, Ranking)}
        loss = self._ranking(of, ranking.sizes, ranking.open)
        if not smoothing:
            return loss
        reverse = self._ranking(of.flip(-1), ranking.sizes[::-1], ranking.open)
        return (1 - smoothing) * loss + smoothing * reverse

    def _ranking(self, scores: Tensor, sizes: tuple[int, ...], open_ties: bool) -> Tensor:
        if open_ties:
            return open_ranking_loss(scores, sizes)
        if len(self.ties.free) == 0:
            return plackett_luce_loss(scores)
        return davidson_luce_loss(scores, sizes, self.ties())

    def _ratings(self, scores: Tensor, attribute: str, values: Sequence[float]) -> Tensor:
        link = self.links[self._names[attribute]]
        return link(self.score(scores, attribute), scores.new_tensor(values))


def _kind(feedback: PreferenceExample) -> tuple[object, ...]:
    """Rows of one kind have as many responses and the same loss."""
    preference = feedback.preference
    if isinstance(preference, Rating):
        return (Rating, *preference.values)
    return (feedback.attribute, Pair if isinstance(preference, Pair) else preference)


class Ties(nn.Module):
    """log δ of Davidson and Luce's model, for ties of 2 and more; starts from how often the data has each."""

    def __init__(self, rankings: Sequence[Ranking]) -> None:
        super().__init__()
        judged = [ranking for ranking in rankings if not ranking.open]
        most = max((size for ranking in judged for size in ranking.sizes), default=1)
        # Were all worths equal, sets of t would be chosen with odds δ_t · (the number of such sets): solved for δ.
        seen, sets = Counter[int](), Counter[int]()
        for ranking in judged:
            left = sum(ranking.sizes)
            for size in ranking.sizes:
                seen[size] += 1
                for t in range(1, most + 1):
                    sets[t] += math.comb(left, t)
                left -= size
        odds = [(seen[t] + 0.5) / max(sets[t], 1) for t in range(1, most + 1)]
        self.free = nn.Parameter(torch.tensor([math.log(each / odds[0]) for each in odds[1:]]))

    def forward(self) -> Tensor:
        """`[D]`, the first of them 0."""
        return torch.cat([self.free.new_zeros(1), self.free])


class Line(nn.Module):
    """A rating is a line of the score, rising, plus noise: ratings are standardised, the slope starts at 1."""

    def __init__(self, ratings: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = fmean(ratings), pstdev(ratings) or 1.0
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.intercept = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """Losses `[N]`."""
        expected = self.log_slope.exp() * scores + self.intercept
        return regression_loss(expected, (ratings - self.mean) / self.std)


class Steps(nn.Module):
    """A rating is one of a few levels in order; the score passes a threshold between each two of them."""

    def __init__(self, ratings: Sequence[float]) -> None:
        super().__init__()
        self.levels = sorted(set(ratings))
        counts = Counter(ratings)
        below, cuts = 0, []
        for level in self.levels[:-1]:  # where every score is 0, the thresholds give each level its share
            below += counts[level]
            cuts.append(math.log(below / (len(ratings) - below)))
        gaps = [math.log(math.expm1(b - a)) for a, b in pairwise(cuts)]
        self.first = nn.Parameter(torch.tensor(cuts[:1]))
        self.gaps = nn.Parameter(torch.tensor(gaps))

    def forward(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """Losses `[N]`. A level that training has not seen counts as the nearest that it has."""
        levels = ratings.new_tensor(self.levels)
        level = (ratings[:, None] - levels).abs().argmin(-1)
        return ordinal_loss(scores, level, self.thresholds())

    def thresholds(self) -> Tensor:
        """`[levels - 1]`, rising."""
        return torch.cat([self.first, self.first + softplus(self.gaps).cumsum(0)])
