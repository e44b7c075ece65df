"""What the responses of a microbatch are compared by in preference optimisation."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedPreference
from align.supervised.response_logprobs import PromptedResponse
from rewards.preferences import TIE, Pair, PreferenceExample, Ranking, Rating


@dataclass(frozen=True)
class DpoExample:
    """A preference example with the reference's log-probabilities.

    Attributes:
        preference: The example.
        mismatched: A response to another prompt, after the prompt of this example.
        reference: Log-probability of each response under the reference, in nats; 0 where the loss does not read it.
        mismatched_reference: The same of the mismatched response.
    """

    preference: TokenizedPreference
    mismatched: PromptedResponse
    reference: tuple[float, ...]
    mismatched_reference: float = 0.0

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass, padding included."""
        return self.preference.length


@dataclass(frozen=True)
class PreferencePair:
    """Two responses of an example.

    Attributes:
        first: Index of the response that is preferred, or of one of two equals.
        second: Index of the other one.
        preference: The probability that the first is better; ½ for a tie.
        margin: The margin that the annotator stated; 0 without one.
    """

    first: int
    second: int
    preference: float = 1.0
    margin: float = 0.0


@dataclass(frozen=True)
class DpoTargets:
    """The comparisons of R responses of B examples.

    Attributes:
        reference: `[R]` float64, log-probabilities under the reference, in nats.
        tokens: `[R]` float64, tokens of each response.
        first: `[C]` int64, index of the preferred response of each comparison.
        second: `[C]` int64, index of the other one.
        preference: `[C]` float64, the probability that the label is right.
        margin: `[C]` float64, the margins that annotators stated.
        weight: `[C]` float64, one by the number of the comparisons of the example.
        desirable: `[R]` bool, whether a response is good by itself.
        labelled: `[R]` float64, one by the number of the example's responses that are good or bad by themselves; 0 for
            others.
        rankings: Strict or open rankings of more than two: where their responses begin, and the sizes of their groups.
    """

    reference: Tensor
    tokens: Tensor
    first: Tensor
    second: Tensor
    preference: Tensor
    margin: Tensor
    weight: Tensor
    desirable: Tensor
    labelled: Tensor
    rankings: tuple[tuple[int, tuple[int, ...]], ...]

    def to(self, device: torch.device) -> "DpoTargets":
        """The same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return DpoTargets(**moved)


def make_examples(preferences: Sequence[TokenizedPreference]) -> list[DpoExample]:
    """The examples, without the reference's log-probabilities; each with the first response of the next one."""
    examples = []
    for preference, following in zip(preferences, [*preferences[1:], *preferences[:1]], strict=True):
        examples.append(
            DpoExample(
                preference=replace(preference, shares_prompt=False),
                mismatched=PromptedResponse(preference.prompt_ids, following.responses_ids[0]),
                reference=(0.0,) * len(preference.responses_ids),
            )
        )
    return examples


def all_responses(examples: Sequence[DpoExample]) -> list[PromptedResponse]:
    """The responses of examples, each after a copy of its prompt."""
    responses: list[PromptedResponse] = []
    for example in examples:
        preference = example.preference
        responses += [PromptedResponse(preference.prompt_ids, ids) for ids in preference.responses_ids]
    return responses


def make_targets(examples: Sequence[DpoExample], listwise: bool) -> DpoTargets:
    """The comparisons of the examples of a microbatch.

    Args:
        examples: The examples.
        listwise: Whether a ranking of more than two counts as a whole, see `is_listwise`, instead of as comparisons.
    """
    reference: list[float] = []
    tokens: list[int] = []
    first: list[int] = []
    second: list[int] = []
    preference: list[float] = []
    margin: list[float] = []
    weight: list[float] = []
    desirable: list[bool] = []
    labelled: list[float] = []
    rankings: list[tuple[int, tuple[int, ...]]] = []
    start = 0
    for example in examples:
        row = example.preference.example
        marks = labels(row)
        count = sum(mark is not None for mark in marks)
        desirable += [bool(mark) for mark in marks]
        labelled += [0.0 if mark is None else 1 / count for mark in marks]
        if listwise and isinstance(row.preference, Ranking) and is_listwise(row.preference):
            rankings.append((start, row.preference.sizes))
        else:
            pairs = comparisons_of(row)
            first += [start + pair.first for pair in pairs]
            second += [start + pair.second for pair in pairs]
            preference += [pair.preference for pair in pairs]
            margin += [pair.margin for pair in pairs]
            weight += [1 / len(pairs) for _ in pairs]
        reference += example.reference
        tokens += map(len, example.preference.responses_ids)
        start += len(row.responses)
    return DpoTargets(
        reference=torch.tensor(reference, dtype=torch.float64),
        tokens=torch.tensor(tokens, dtype=torch.float64),
        first=torch.tensor(first, dtype=torch.long),
        second=torch.tensor(second, dtype=torch.long),
        preference=torch.tensor(preference, dtype=torch.float64),
        margin=torch.tensor(margin, dtype=torch.float64),
        weight=torch.tensor(weight, dtype=torch.float64),
        desirable=torch.tensor(desirable, dtype=torch.bool),
        labelled=torch.tensor(labelled, dtype=torch.float64),
        rankings=tuple(rankings),
    )


def is_listwise(ranking: Ranking) -> bool:
    """Whether a ranking has a likelihood of its own: more than two responses, and no tie that is a judgement."""
    return sum(ranking.sizes) > 2 and (ranking.open or max(ranking.sizes) == 1)


def comparisons_of(example: PreferenceExample) -> list[PreferencePair]:
    """The comparisons of two responses that an example contains.

    Of a ranking, each two of different rank, and each two that were judged equally good.
    """
    preference = example.preference
    if isinstance(preference, Pair):
        return [PreferencePair(0, 1, preference.certainty, preference.margin)]
    if isinstance(preference, Rating):
        return []
    ranks: list[int] = []
    for rank, size in enumerate(preference.sizes):
        ranks += [rank] * size
    found = []
    for first, second in combinations(range(len(ranks)), 2):
        if ranks[first] < ranks[second]:
            found.append(PreferencePair(first, second))
        elif not preference.open:
            found.append(PreferencePair(first, second, TIE))
    return found


def labels(example: PreferenceExample) -> list[bool | None]:
    """For each response, whether it is good (True) or bad (False) by itself; None: the example does not say.

    In a pair the preferred response is good and the other one bad, unless they tie; in a ranking so are the first and
    the last group. A rating of 1 is good, and one of 0 bad.
    """
    preference = example.preference
    if isinstance(preference, Rating):
        return [value > 0 for value in preference.values.values()]
    if isinstance(preference, Pair):
        return [None, None] if preference.certainty == TIE else [True, False]
    sizes = preference.sizes
    if len(sizes) == 1:
        return [None] * sizes[0]
    between = sum(sizes[1:-1])
    return [True] * sizes[0] + [None] * between + [False] * sizes[-1]
