"""The training objective of a reward model: the negative log-likelihood of preference examples given its scores."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean, pstdev
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rewards.losses import bradley_terry_loss, ordinal_loss, regression_loss
from rewards.preferences import OVERALL, Pair, Preference, PreferenceExample, Ranking, Rating
from rewards.rankings import (
    choices,
    davidson_luce_loss,
    open_ranking_loss,
    plackett_luce_loss,
    ties_of_equal_worths,
)

Ratings = Literal["regression", "ordinal"]


@dataclass(frozen=True)
class OwnGroup:
    """Parameters with a peak learning rate and settings of AdamW of their own."""

    parameters: list[nn.Parameter]
    learning_rate: float
    options: Mapping[str, Any]


class PreferenceLoss(nn.Module):
    """The loss of each preference example, whatever its kind, with the parameters that link scores to annotations.

    These parameters say how readily annotators call a tie (`ties`), and how a rating depends on the score (`links`, one
    for each rated attribute). They are trained with the model, and are not part of it afterwards.
    """

    def __init__(
        self,
        examples: Sequence[PreferenceExample],
        weights: Mapping[str, float],
        ratings: Ratings,
        heldout: Sequence[PreferenceExample] = (),
    ) -> None:
        """Initialise the links from the data.

        Args:
            examples: All training examples.
            weights: The weights of the attributes in the overall score, in the order of the model's heads;
                `{"": 1.0}` for a model without named attributes.
            ratings: `regression`: ratings are numbers; `ordinal`: they are ordered levels.
            heldout: Further examples whose loss will be computed.
        """
        super().__init__()
        self.attribute_index = {name: i for i, name in enumerate(weights)}
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([*weights.values()]), persistent=False)
        rankings = [example.preference for example in examples if isinstance(example.preference, Ranking)]
        preferences = [example.preference for example in (*examples, *heldout)]
        largest = max((largest_tie(preference) for preference in preferences), default=1)
        self.ties = TieParameters(rankings, len(examples), largest)
        rated: dict[str, list[float]] = {}
        for preference in preferences:
            if isinstance(preference, Rating):
                for name, value in preference.values.items():
                    rated.setdefault(name, []).append(value)
        link = {"regression": LinearRatingLink, "ordinal": OrdinalRatingLink}[ratings]
        self._names = {name: f"of {name}" if name else "overall" for name in rated}  # a module's name is not empty
        self.links = nn.ModuleDict({self._names[name]: link(values) for name, values in rated.items()})

    @property
    def own_groups(self) -> dict[str, OwnGroup]:
        """Parameters that need settings of AdamW of their own, by name."""
        if not len(self.ties.free):
            return {}
        return {"ties": OwnGroup([self.ties.free], TieParameters.LEARNING_RATE, TieParameters.OPTIMIZER)}

    def nothing(self) -> Tensor:
        """Zero `[]`, with a gradient of zero for every parameter.

        A microbatch need not use all of them, but all ranks must have a gradient of the same parameters.
        """
        none = self.weights.new_zeros(0)
        total: Tensor = self.ties().sum() * 0.0
        for link in self.links.values():
            total = total + link(none, none).sum()
        return total

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
        if not ranking.open:
            losses = losses + self.ties.control_variate(ranking.sizes)
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


def largest_tie(preference: Preference) -> int:
    """The largest number of responses that a preference judges equally good; 1 if it has no such ties."""
    return max(preference.sizes) if isinstance(preference, Ranking) and not preference.open else 1


class TieParameters(nn.Module):
    """log δ of Davidson and Luce's model, for ties of 2 and more; initialised from how often the data has ties.

    Their gradient is per choice, a difference between two shares of ties: those that the model expects and those of the
    whole training data, instead of the batch, since the number of ties in a batch would say more about the batch than
    about δ. Over all examples, it adds up to a multiple of the likelihood's.
    """

    LEARNING_RATE: ClassVar[float] = 0.5
    OPTIMIZER: ClassVar[Mapping[str, Any]] = {"betas": (0.0, 0.99), "eps": 0.05, "weight_decay": 0.0}
    """AdamW's settings for them. Whatever the model and its learning rate, the gradient is a difference of shares, and
    the curvature at most ¼. So, without momentum and with such an epsilon, a step is about Newton's near the optimum,
    and at most `LEARNING_RATE` far from it."""

    def __init__(self, rankings: Sequence[Ranking], examples: int, largest: int = 1) -> None:
        """Initialise δ as if all worths were equal.

        Args:
            rankings: Those of the training data.
            examples: Number of training examples of all kinds.
            largest: Size of the largest tie whose loss will be computed.
        """
        super().__init__()
        made: list[tuple[int, int]] = []
        for ranking in rankings:
            if not ranking.open:
                made += choices(ranking.sizes)
            largest = max(largest, largest_tie(ranking))
        chosen = Counter(size for _, size in made)
        remaining = Counter(available for available, _ in made)
        most = max(remaining, default=1)
        # Half an observation stands for none, which keeps log δ finite where a size never occurs.
        counts = [max(chosen[size], 0.5) if size <= most else 0.0 for size in range(1, largest + 1)]
        delta = ties_of_equal_worths(counts, remaining)
        self.free = nn.Parameter(torch.tensor([math.log(value) for value in delta[1:]]))
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(counts[1:]) / sum(counts), persistent=False)
        self.scale = examples / max(len(made), 1)

    def forward(self) -> Tensor:
        """log δ `[D]`; the first is 0."""
        fixed = self.free.detach()
        free = fixed + self.scale * (self.free - fixed)  # scales the gradient alone
        return torch.cat([free.new_zeros(1), free])

    def control_variate(self, sizes: Sequence[int]) -> Tensor:
        """Zero, with the gradient that replaces the ties of a ranking by those of as many choices in the data."""
        made = choices(sizes)
        chosen = Counter(size for _, size in made)
        counts = self.shares.new_tensor([chosen[size] for size in range(2, len(self.free) + 2)])  # [D - 1]
        excess = counts - len(made) * self.shares
        log_ties: Tensor = self()
        return (excess * (log_ties[1:] - self.free.detach())).sum()


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
        # Added one by one, because CUDA has no deterministic cumulative sum of floating-point numbers.
        offsets = accumulate(softplus(self.gaps).unbind())
        return torch.cat([self.first, *(self.first + offset for offset in offsets)])
