"""The training objective of a reward model: the negative log-likelihood of preference examples given its scores."""

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
    """The loss of each preference example, whatever its kind, with the parameters that link scores to annotations.

    These parameters say how readily annotators call a tie (`ties`), and how a rating depends on the score (`links`, one
    for each rated attribute). They are trained with the model, and are not part of it afterwards.
    """

    def __init__(self, examples: Sequence[PreferenceExample], weights: Mapping[str, float], ratings: Ratings) -> None:
        """Initialise the links from the training data.

        Args:
            examples: All training examples.
            weights: The weights of the attributes in the overall score, in the order of the model's heads;
                `{"": 1.0}` for a model without named attributes.
            ratings: `regression`: ratings are numbers; `ordinal`: they are ordered levels.
        """
        super().__init__()
        self.attribute_index = {name: i for i, name in enumerate(weights)}
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([*weights.values()]), persistent=False)
        preferences = [example.preference for example in examples]
        self.ties = TieParameters([preference for preference in preferences if isinstance(preference, Ranking)])
        rated: dict[str, list[float]] = {}
        for preference in preferences:
            if isinstance(preference, Rating):
                for name, value in preference.values.items():
                    rated.setdefault(name, []).append(value)
        link = {"regression": LinearRatingLink, "ordinal": OrdinalRatingLink}[ratings]
        self._names = {name: f"of {name}" if name else "overall" for name in rated}  # a module's name is not empty
        self.links = nn.ModuleDict({self._names[name]: link(values) for name, values in rated.items()})

    def forward(self, scores: Tensor, examples: Sequence[PreferenceExample], smoothing: float = 0.0) -> Tensor:
        """Compute the loss of each example.

        Args:
            scores: `[R, A]` float by attribute, of the responses of all B examples in order.
            examples: `[B]`.
            smoothing: Share of the comparisons that are assumed to be reversed.

        Returns:
            Losses `[B]`, in nats.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(_loss_key(example), []).append(i)
        starts = list(accumulate((len(example.responses) for example in examples), initial=0))
        losses = scores.new_zeros(len(examples))
        for members in groups.values():
            group = [examples[i] for i in members]
            count = len(group[0].responses)
            responses = [range(starts[i], starts[i] + count) for i in members]
            index = torch.tensor(responses, device=scores.device)  # [G, K]
            group_losses = self._group_losses(scores[index], group, smoothing)  # [G]
            losses = losses.index_add(0, torch.tensor(members, device=scores.device), group_losses)
        return losses

    def score(self, scores: Tensor, attribute: str) -> Tensor:
        """Select one attribute's scores, or compute the overall ones.

        Args:
            scores: `[..., A]` by attribute.
            attribute: Its name, or `OVERALL`.

        Returns:
            Scores `[...]`.
        """
        return scores @ self.weights if attribute == OVERALL else scores[..., self.attribute_index[attribute]]

    def _group_losses(self, scores: Tensor, group: Sequence[PreferenceExample], smoothing: float) -> Tensor:
        """Losses `[G]` of examples with the same key; scores `[G, K, A]`."""
        preferences = [example.preference for example in group]
        ratings = [preference for preference in preferences if isinstance(preference, Rating)]
        if ratings:
            return self._rating_losses(scores[:, 0], ratings)
        attribute_scores = self.score(scores, group[0].attribute)  # [G, K]
        pairs = [preference for preference in preferences if isinstance(preference, Pair)]
        if pairs:
            return _pair_losses(attribute_scores, pairs, smoothing)
        (ranking,) = {preference for preference in preferences if isinstance(preference, Ranking)}
        return self._smoothed_ranking_losses(attribute_scores, ranking, smoothing)

    def _smoothed_ranking_losses(self, scores: Tensor, ranking: Ranking, smoothing: float) -> Tensor:
        """Losses `[G]` of equal rankings; scores `[G, K]`, best first."""
        losses = self._ranking_losses(scores, ranking.sizes, ranking.open)
        if not smoothing:
            return losses
        reverse = self._ranking_losses(scores.flip(-1), ranking.sizes[::-1], ranking.open)
        return (1 - smoothing) * losses + smoothing * reverse

    def _ranking_losses(self, scores: Tensor, sizes: tuple[int, ...], open_ties: bool) -> Tensor:
        if open_ties:
            return open_ranking_loss(scores, sizes)
        if len(self.ties.free) == 0:
            return plackett_luce_loss(scores)
        return davidson_luce_loss(scores, sizes, self.ties())

    def _rating_losses(self, scores: Tensor, ratings: Sequence[Rating]) -> Tensor:
        """Losses `[G]`, summed over the rated attributes, which all ratings share; scores `[G, A]`."""
        losses = scores.new_zeros(len(ratings))
        for name in ratings[0].values:
            values = scores.new_tensor([rating.values[name] for rating in ratings])
            link = self.links[self._names[name]]
            losses = losses + link(self.score(scores, name), values)
        return losses


def _pair_losses(scores: Tensor, pairs: Sequence[Pair], smoothing: float) -> Tensor:
    """Losses `[G]` of pairs; scores `[G, 2]`."""
    margin = scores.new_tensor([pair.margin for pair in pairs])
    certainty = scores.new_tensor([pair.certainty for pair in pairs])
    preference = certainty * (1 - smoothing) + (1 - certainty) * smoothing
    return bradley_terry_loss(scores[:, 0], scores[:, 1], margin, preference)


def _loss_key(example: PreferenceExample) -> tuple[object, ...]:
    """Examples with the same key have the same number of responses and the same loss: they are computed together."""
    preference = example.preference
    if isinstance(preference, Rating):
        return (Rating, *preference.values)
    return (example.attribute, Pair if isinstance(preference, Pair) else preference)


class TieParameters(nn.Module):
    """log δ of Davidson and Luce's model, for ties of 2 and more; initialised from how often the data has ties."""

    def __init__(self, rankings: Sequence[Ranking]) -> None:
        """Solve for δ as if all worths were equal: sets of t are then chosen with odds δ_t · (number of such sets)."""
        super().__init__()
        closed = [ranking for ranking in rankings if not ranking.open]  # ties mean equally good
        largest = max((max(ranking.sizes) for ranking in closed), default=1)
        chosen = Counter[int]()
        available = Counter[int]()
        for ranking in closed:
            remaining = sum(ranking.sizes)
            for size in ranking.sizes:
                chosen[size] += 1
                for t in range(1, largest + 1):
                    available[t] += math.comb(remaining, t)
                remaining -= size
        # Half an observation is added, which keeps the logarithm finite where a size never occurs.
        odds = [(chosen[t] + 0.5) / max(available[t], 1) for t in range(1, largest + 1)]
        self.free = nn.Parameter(torch.tensor([math.log(value / odds[0]) for value in odds[1:]]))

    def forward(self) -> Tensor:
        """log δ `[D]`; the first is 0."""
        return torch.cat([self.free.new_zeros(1), self.free])


class LinearRatingLink(nn.Module):
    """A standardised rating is an increasing linear function of the score plus noise; the slope starts at 1."""

    def __init__(self, ratings: Sequence[float]) -> None:
        super().__init__()
        self.mean = fmean(ratings)
        self.std = pstdev(ratings) or 1.0
        self.log_slope = nn.Parameter(torch.zeros(()))
        self.intercept = nn.Parameter(torch.zeros(()))

    def forward(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """Losses `[N]`, in nats, of scores `[N]` and ratings `[N]`."""
        expected = self.log_slope.exp() * scores + self.intercept
        return regression_loss(expected, (ratings - self.mean) / self.std)


class OrdinalRatingLink(nn.Module):
    """A rating is one of a few ordered levels; there is a threshold on the score between each two neighbours."""

    def __init__(self, ratings: Sequence[float]) -> None:
        """Initialise the thresholds so that at a score of 0 each level has its share of the data."""
        super().__init__()
        self.levels = sorted(set(ratings))
        counts = Counter(ratings)
        below = 0
        thresholds: list[float] = []
        for level in self.levels[:-1]:
            below += counts[level]
            thresholds.append(math.log(below / (len(ratings) - below)))
        gaps = [math.log(math.expm1(upper - lower)) for lower, upper in pairwise(thresholds)]  # inverse of softplus
        self.first = nn.Parameter(torch.tensor(thresholds[:1]))
        self.gaps = nn.Parameter(torch.tensor(gaps))

    def forward(self, scores: Tensor, ratings: Tensor) -> Tensor:
        """Losses `[N]`, in nats. A rating that did not occur in training counts as the nearest level."""
        levels = ratings.new_tensor(self.levels)
        level = (ratings[:, None] - levels).abs().argmin(-1)  # [N]
        return ordinal_loss(scores, level, self.thresholds())

    def thresholds(self) -> Tensor:
        """Thresholds `[levels - 1]`, increasing."""
        return torch.cat([self.first, self.first + softplus(self.gaps).cumsum(0)])
