"""The training objective of a reward model: the negative log-likelihood of preference examples given its scores."""

import math
from abc import ABC, abstractmethod
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
        if self.ties.largest == 1:
            return {}
        return {"ties": OwnGroup([*self.ties.parameters()], TieParameters.LEARNING_RATE, TieParameters.OPTIMIZER)}

    def forward(self, scores: Tensor, examples: Sequence[PreferenceExample], smoothing: float = 0.0) -> Tensor:
        """Compute the loss of each example.

        Args:
            scores: `[R, A]` float by attribute, of the responses of all B examples in order.
            examples: `[B]`.
            smoothing: Share of the comparisons that are assumed to be reversed.

        Returns:
            Losses `[B]`, in nats.
        """
        parameters = self._read_parameters()
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
            group_losses = self._group_losses(scores[index], group, parameters, smoothing)  # [G]
            losses = losses.index_add(0, torch.tensor(members, device=scores.device), group_losses)
        return losses + parameters.nothing()

    def _read_parameters(self) -> "_LossParameters":
        """All parameters; each module that holds some is called once, in the same order whatever the examples.

        In this order ZeRO gathers parameters and reduces gradients, on all ranks together.
        """
        links = {name: self.links[module_name]() for name, module_name in self._names.items()}
        return _LossParameters(self.ties(), links)

    def score(self, scores: Tensor, attribute: str) -> Tensor:
        """Select one attribute's scores, or compute the overall ones.

        Args:
            scores: `[..., A]` by attribute.
            attribute: Its name, or `OVERALL`.

        Returns:
            Scores `[...]`.
        """
        return scores @ self.weights if attribute == OVERALL else scores[..., self.attribute_index[attribute]]

    def _group_losses(
        self, scores: Tensor, group: Sequence[PreferenceExample], parameters: "_LossParameters", smoothing: float
    ) -> Tensor:
        """Losses `[G]` of examples with the same key; scores `[G, K, A]`."""
        preferences = [example.preference for example in group]
        ratings = [preference for preference in preferences if isinstance(preference, Rating)]
        if ratings:
            return self._rating_losses(scores[:, 0], ratings, parameters.links)
        attribute_scores = self.score(scores, group[0].attribute)  # [G, K]
        pairs = [preference for preference in preferences if isinstance(preference, Pair)]
        if pairs:
            return _pair_losses(attribute_scores, pairs, smoothing)
        (ranking,) = {preference for preference in preferences if isinstance(preference, Ranking)}
        return self._smoothed_ranking_losses(attribute_scores, ranking, parameters.log_ties, smoothing)

    def _smoothed_ranking_losses(self, scores: Tensor, ranking: Ranking, log_ties: Tensor, smoothing: float) -> Tensor:
        """Losses `[G]` of equal rankings; scores `[G, K]`, best first."""
        losses = _ranking_losses(scores, ranking.sizes, ranking.open, log_ties)
        if not ranking.open:
            losses = losses + self.ties.control_variate(ranking.sizes, log_ties)
        if not smoothing:
            return losses
        reverse = _ranking_losses(scores.flip(-1), ranking.sizes[::-1], ranking.open, log_ties)
        return (1 - smoothing) * losses + smoothing * reverse

    def _rating_losses(self, scores: Tensor, ratings: Sequence[Rating], links: Mapping[str, Tensor]) -> Tensor:
        """Losses `[G]`, summed over the rated attributes, which all ratings share; scores `[G, A]`."""
        losses = scores.new_zeros(len(ratings))
        for name in ratings[0].values:
            values = scores.new_tensor([rating.values[name] for rating in ratings])
            link = self.links[self._names[name]]
            assert isinstance(link, RatingLink)
            losses = losses + link.losses(self.score(scores, name), values, links[name])
        return losses


@dataclass(frozen=True)
class _LossParameters:
    """The parameters of the loss in a forward pass: log δ `[D]`, and those of each rated attribute's link."""

    log_ties: Tensor
    links: Mapping[str, Tensor]

    def nothing(self) -> Tensor:
        """Zero `[]`, with a gradient of zero for every parameter.

        A microbatch need not use all of them, but all ranks must have a gradient of the same parameters.
        """
        total: Tensor = self.log_ties.sum() * 0.0
        for parameters in self.links.values():
            total = total + parameters.sum() * 0.0
        return total


def _ranking_losses(scores: Tensor, sizes: tuple[int, ...], open_ties: bool, log_ties: Tensor) -> Tensor:
    """Losses `[G]` of equal rankings; scores `[G, K]`, best first."""
    if open_ties:
        return open_ranking_loss(scores, sizes)
    if len(log_ties) == 1:
        return plackett_luce_loss(scores)
    return davidson_luce_loss(scores, sizes, log_ties)


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
        self.largest = largest
        self.free: Tensor
        _add_parameter(self, "free", [math.log(value) for value in delta[1:]])
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(counts[1:]) / sum(counts), persistent=False)
        self.scale = examples / max(len(made), 1)

    def forward(self) -> Tensor:
        """log δ `[D]`; the first is 0."""
        fixed = self.free.detach()
        free = fixed + self.scale * (self.free - fixed)  # scales the gradient alone
        return torch.cat([free.new_zeros(1), free])

    def control_variate(self, sizes: Sequence[int], log_ties: Tensor) -> Tensor:
        """Zero, with the gradient that replaces the ties of a ranking by those of as many choices in the data."""
        made = choices(sizes)
        chosen = Counter(size for _, size in made)
        counts = self.shares.new_tensor([chosen[size] for size in range(2, self.largest + 1)])  # [D - 1]
        excess = counts - len(made) * self.shares
        return (excess * (log_ties - log_ties.detach())[1:]).sum()


class RatingLink(nn.Module, ABC):
    """How the ratings of an attribute depend on the score. Calling it gives its parameters, in one tensor."""

    @abstractmethod
    def losses(self, scores: Tensor, ratings: Tensor, parameters: Tensor) -> Tensor:
        """Losses `[N]`, in nats, of scores `[N]` and ratings `[N]`, with the parameters that calling it gave."""


class LinearRatingLink(RatingLink):
    """A standardised rating is an increasing linear function of the score plus noise; the slope starts at 1."""

    def __init__(self, ratings: Sequence[float]) -> None:
        super().__init__()
        self.mean = fmean(ratings)
        self.std = pstdev(ratings) or 1.0
        self.log_slope = nn.Parameter(torch.zeros(1))  # DeepSpeed cannot broadcast a parameter without dimensions
        self.intercept = nn.Parameter(torch.zeros(1))

    def forward(self) -> Tensor:
        """Slope and intercept, `[2]`."""
        return torch.cat([self.log_slope.exp(), self.intercept])

    def losses(self, scores: Tensor, ratings: Tensor, parameters: Tensor) -> Tensor:
        slope, intercept = parameters
        return regression_loss(slope * scores + intercept, (ratings - self.mean) / self.std)


class OrdinalRatingLink(RatingLink):
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
        self.first: Tensor
        self.gaps: Tensor
        _add_parameter(self, "first", thresholds[:1])
        _add_parameter(self, "gaps", gaps)

    def forward(self) -> Tensor:
        """Thresholds `[levels - 1]`, increasing."""
        # Added one by one, because CUDA has no deterministic cumulative sum of floating-point numbers.
        offsets = accumulate(softplus(self.gaps).unbind())
        return torch.cat([self.first, *(self.first + offset for offset in offsets)])

    def losses(self, scores: Tensor, ratings: Tensor, parameters: Tensor) -> Tensor:
        """As of `RatingLink`. A rating that did not occur in training counts as the nearest level."""
        levels = ratings.new_tensor(self.levels)
        level = (ratings[:, None] - levels).abs().argmin(-1)  # [N]
        return ordinal_loss(scores, level, parameters)


def _add_parameter(module: nn.Module, name: str, values: Sequence[float]) -> None:
    """Give a module a trained vector; without values it is a buffer: ZeRO 3 cannot gather an empty parameter."""
    if values:
        module.register_parameter(name, nn.Parameter(torch.tensor(values)))
    else:
        module.register_buffer(name, torch.zeros(0), persistent=False)
