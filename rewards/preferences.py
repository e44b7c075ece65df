"""Preference examples: pairs, rankings, choices and ratings of responses, parsed from rows of data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from os.path import commonprefix
from typing import Any

from policies.text import columns as fields
from policies.text.tokenization import Message, Prompt
from rewards.rankings import MAX_OPEN_TIE

TURN = "\n\nAssistant:"
"""The start of a reply in a transcript in the format of HH-RLHF."""


TIE = 0.5
"""The certainty of a preference between two responses that are equally good."""


@dataclass(frozen=True)
class Pair:
    """A preference for the first of two responses.

    Attributes:
        margin: How much higher its score should be, at least.
        certainty: The probability that the label is right; ½ for a tie.
    """

    margin: float = 0.0
    certainty: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """Responses in groups of equal rank, best first.

    Attributes:
        sizes: The size of each group.
        open: Whether the order within a group is unknown; otherwise its members were judged equally good.
    """

    sizes: tuple[int, ...]
    open: bool = False


@dataclass(frozen=True)
class Rating:
    """The ratings of one response by attribute; `OVERALL` where it has only one."""

    values: Mapping[str, float] = field(hash=False)


Preference = Pair | Ranking | Rating

OVERALL = ""
"""The attribute of preferences about a response as a whole."""


@dataclass(frozen=True)
class PreferenceExample:
    """Responses to a prompt and a preference about them.

    Attributes:
        prompt: Text or messages.
        responses: Best first, where one is better than another.
        preference: A pair, a ranking or a rating of the responses.
        attribute: What they were compared by; ratings name their attributes themselves.
        subset: The part of a benchmark that the example belongs to; empty without one.
        row_id: What the benchmark calls the example; empty without a subset.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    preference: Preference
    attribute: str = OVERALL
    subset: str = ""
    row_id: str = field(default="", repr=False)  # the digest of the data is of the `repr`, and does not depend on names

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes that the responses were compared or rated by."""
        return tuple(self.preference.values) if isinstance(self.preference, Rating) else (self.attribute,)


def parse_preference(values: Mapping[str, Any], open_ties: bool = False) -> PreferenceExample:
    """Parse a preference example; the columns of the row determine its kind.

    * `chosen`, `rejected`, after `prompt` or as complete transcripts without it; optional `margin`, `confidence`, `tie`
    * `prompt`, `chosen`, `rejected`, both lists of texts (RewardBench 2): each of the first is better than all others
    * `prompt`, `responses`, `ranks` (1 is best, equal ranks are ties); optional `ties`: `judged` or `unknown`
    * `prompt`, `responses`, `best` (the index of the best, from 0)
    * `prompt`, `response`, `rating` (a number, or an object of numbers by attribute)

    All but the last may have an `attribute`, and each a `subset` of a benchmark, with an `id` in it.

    Args:
        values: The row by column.
        open_ties: Whether the order of equal ranks is unknown, where the row has no `ties`.

    Raises:
        ValueError: The row is none of these; the message is for users.
    """
    example = _parse(values, open_ties)
    if not fields.has(values, "subset"):
        return example
    return replace(example, subset=fields.text(values, "subset"), row_id=str(values.get("id", "")))


def _parse(values: Mapping[str, Any], open_ties: bool) -> PreferenceExample:
    attribute = fields.text(values, "attribute") if fields.has(values, "attribute") else OVERALL
    if _has_lists(values):
        return _groups(values, attribute)
    if fields.has(values, "chosen") or fields.has(values, "rejected"):
        return _pair(values, attribute)
    if fields.has(values, "responses"):
        return _choice(values, attribute) if fields.has(values, "best") else _ranking(values, attribute, open_ties)
    if fields.has(values, "rating"):
        return _rating(values)
    if fields.has(values, "labels"):
        raise ValueError(
            "the row has `labels` of steps: a reward model learns preferences or labels of steps, not both; set "
            "data.step_labels to a source of its own, and a term of kind process in reward.terms"
        )
    names = ", ".join(f"`{key}`" for key in values) or "no columns"
    raise ValueError(
        "neither `chosen` and `rejected`, nor `responses` with `ranks` or `best`, nor `response` and `rating`; the row "
        f"has {names}, and the source's `columns` can rename them"
    )


def _has_lists(values: Mapping[str, Any]) -> bool:
    """Whether `chosen` and `rejected` are lists of texts, not messages."""
    lists = [values.get("chosen"), values.get("rejected")]
    return all(isinstance(texts, list) and texts and isinstance(texts[0], str) for texts in lists)


def _groups(values: Mapping[str, Any], attribute: str) -> PreferenceExample:
    prompt = fields.prompt(values)
    groups = []
    for name in ("chosen", "rejected"):
        groups.append([fields.reply(response, f"{name}[{i}]") for i, response in enumerate(values[name])])
    chosen, rejected = groups
    if both := set(chosen) & set(rejected):
        raise ValueError(f"{fields.shown(min(both))} is both in `chosen` and in `rejected`")
    return PreferenceExample(prompt, (*chosen, *rejected), Ranking((len(chosen), len(rejected))), attribute)


def _pair(values: Mapping[str, Any], attribute: str) -> PreferenceExample:
    prompt, chosen, rejected = _pair_texts(values)
    tie = fields.has(values, "tie") and fields.flag(values, "tie")
    if chosen == rejected and not tie:
        raise ValueError("`chosen` and `rejected` are the same, and `tie` is not set")
    margin = fields.number(values, "margin") if fields.has(values, "margin") else 0.0
    certainty = _certainty(values, tie)
    if margin and certainty == TIE:  # the loss would be least where the scores differ by the margin
        raise ValueError("a tie has no `margin`" if tie else "`confidence: 0.5` is a tie, and a tie has no `margin`")
    return PreferenceExample(prompt, (chosen, rejected), Pair(margin, certainty), attribute)


def _pair_texts(values: Mapping[str, Any]) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected response, in any of the three forms."""
    chosen = fields.present(values, "chosen")
    rejected = fields.present(values, "rejected")
    if fields.has(values, "prompt"):
        prompt = fields.prompt(values)
        return prompt, fields.reply(chosen, "chosen"), fields.reply(rejected, "rejected")
    if isinstance(chosen, list):
        return _split_messages(fields.messages(chosen, "chosen"), fields.messages(rejected, "rejected"))
    return _split_transcripts(fields.text(values, "chosen"), fields.text(values, "rejected"))


def _certainty(values: Mapping[str, Any], tie: bool) -> float:
    """The probability that the first response is the better one, from ½, a tie, to 1."""
    if not fields.has(values, "confidence"):
        return TIE if tie else 1.0
    confidence = fields.number(values, "confidence")
    if not TIE <= confidence <= 1:
        raise ValueError(
            f"`confidence` is {confidence:g}: it is the probability that `chosen` is the better one, from 0.5 to 1"
        )
    if tie and confidence != TIE:
        raise ValueError(f"`confidence` is {confidence:g}, and that of a `tie` is 0.5")
    return confidence


def _ranking(values: Mapping[str, Any], attribute: str, open_ties: bool) -> PreferenceExample:
    prompt = fields.prompt(values)
    responses = _responses(values)
    ranks = fields.numbers(values, "ranks")
    if len(ranks) != len(responses):
        raise ValueError(f"{len(ranks)} `ranks` for {len(responses)} `responses`")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    sizes = tuple(len(list(group)) for _, group in groupby(order, key=lambda i: ranks[i]))
    open_ties = _has_open_ties(values) if fields.has(values, "ties") else open_ties
    if open_ties and len(sizes) == 1:
        raise ValueError("all `ranks` are equal: a single tie of unknown order contains no information")
    if open_ties and max(sizes[:-1]) > MAX_OPEN_TIE:
        raise ValueError(f"a tie of {max(sizes[:-1])}: one of unknown order may have {MAX_OPEN_TIE}, except the last")
    ranked = tuple(responses[i] for i in order)
    return PreferenceExample(prompt, ranked, Ranking(sizes, open_ties), attribute)


def _has_open_ties(values: Mapping[str, Any]) -> bool:
    ties = values["ties"]
    if ties not in ("judged", "unknown"):
        raise ValueError(f"`ties` is {fields.shown(ties)}; `judged` or `unknown` was expected")
    return bool(ties == "unknown")


def _choice(values: Mapping[str, Any], attribute: str) -> PreferenceExample:
    prompt = fields.prompt(values)
    responses = _responses(values)
    best = fields.number(values, "best")
    if best not in range(len(responses)):
        raise ValueError(f"`best` is {best:g}: an index of `responses`, from 0 to {len(responses) - 1}, was expected")
    first = responses.pop(int(best))
    return PreferenceExample(prompt, (first, *responses), Ranking((1, len(responses)), open=True), attribute)


def _rating(values: Mapping[str, Any]) -> PreferenceExample:
    prompt = fields.prompt(values)
    response = fields.reply(fields.present(values, "response"), "response")
    rating = values["rating"]
    if not isinstance(rating, dict):
        return PreferenceExample(prompt, (response,), Rating({OVERALL: fields.number(values, "rating")}))
    attributes = sorted({name for name in rating if fields.has(rating, name)})
    if not attributes:
        raise ValueError("`rating` is an empty object")
    by_attribute = {name: fields.number(rating, name) for name in attributes}
    return PreferenceExample(prompt, (response,), Rating(by_attribute))


def _responses(values: Mapping[str, Any]) -> list[str]:
    responses = fields.items(values, "responses")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"`responses` is {fields.kind(responses)}; a list of two or more was expected")
    return [fields.reply(response, f"responses[{i}]") for i, response in enumerate(responses)]


def _split_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """The messages that both start with, and the single reply that follows in each."""
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise ValueError(
            "`chosen` and `rejected` must be the same messages except the last, or have a separate `prompt`"
        )
    return chosen[:-1], fields.reply(chosen[-1:], "chosen"), fields.reply(rejected[-1:], "rejected")


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common prefix up to its last turn of the assistant, and what follows in each."""
    common = commonprefix([chosen, rejected])  # noqa: RUF071  # of texts, character by character
    end = common.rfind(TURN) + len(TURN)
    if end < len(TURN):
        raise ValueError(f"no `prompt`, and no common prefix with a turn {TURN.strip()!r} to take it from")
    first = fields.text({"chosen": chosen[end:]}, "chosen")
    second = fields.text({"rejected": rejected[end:]}, "rejected")
    return chosen[:end], first, second
