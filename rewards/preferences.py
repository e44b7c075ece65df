"""What people said of responses: pairs, rankings, choices and ratings, as rows of data have them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from os.path import commonprefix
from typing import Any

from policies.text import columns as fields
from policies.text.tokenization import Message, Prompt
from rewards.rankings import MOST_OPEN

TURN = "\n\nAssistant:"
"""What begins a reply in a transcript of HH-RLHF's form."""


@dataclass(frozen=True)
class Pair:
    """Of two responses the first was preferred.

    margin: by how much it should score higher at least. certainty: the probability that this is right, ½ for a tie.
    """

    margin: float = 0.0
    certainty: float = 1.0


@dataclass(frozen=True)
class Ranking:
    """Responses in groups of equal rank, best first; sizes: of the groups.

    open: within a group the order is unknown; otherwise its members were judged equally good.
    """

    sizes: tuple[int, ...]
    open: bool = False


@dataclass(frozen=True)
class Rating:
    """One response's rating, or its ratings by attribute."""

    values: Mapping[str, float] = field(hash=False)


Preference = Pair | Ranking | Rating

OVERALL = ""
"""The attribute of a judgement on a response as a whole."""


@dataclass(frozen=True)
class PreferenceExample:
    """Responses to a prompt, best first where one is better than another, and what was said of them.

    attribute: what they were compared by; ratings name theirs themselves.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    preference: Preference
    attribute: str = OVERALL

    @property
    def attributes(self) -> tuple[str, ...]:
        """What the responses were judged by."""
        return tuple(self.preference.values) if isinstance(self.preference, Rating) else (self.attribute,)


def parse_preference(values: Mapping[str, Any], open_ties: bool = False) -> PreferenceExample:
    """A row of feedback, its kind told by its columns. Raises ValueError with a reason for people.

    * `chosen`, `rejected`, after `prompt` or as whole transcripts without it; optional `margin`, `confidence`, `tie`
    * `prompt`, `responses`, `ranks` (1 is best, equal ranks are ties); optional `ties`, `judged` or `unknown`, which is
      otherwise as `open_ties` says
    * `prompt`, `responses`, `best` (the index of the best, from 0)
    * `prompt`, `response`, `rating` (a number, or an object of numbers by attribute)

    Each but the last may have an `attribute`.
    """
    attribute = fields.text(values, "attribute") if fields.has(values, "attribute") else OVERALL
    if fields.has(values, "chosen") or fields.has(values, "rejected"):
        return _pair(values, attribute)
    if fields.has(values, "responses"):
        return _choice(values, attribute) if fields.has(values, "best") else _ranking(values, attribute, open_ties)
    if fields.has(values, "rating"):
        return _rating(values)
    there = ", ".join(f"`{key}`" for key in values) or "no columns"
    raise ValueError(
        "neither `chosen` and `rejected`, nor `responses` with `ranks` or `best`, nor `response` and `rating`; the row "
        f"has {there}, and the source's `columns` can rename them"
    )


def _pair(values: Mapping[str, Any], attribute: str) -> PreferenceExample:
    chosen, rejected = fields.present(values, "chosen"), fields.present(values, "rejected")
    if fields.has(values, "prompt"):
        prompt = fields.prompt(values)
        first, second = fields.reply(chosen, "chosen"), fields.reply(rejected, "rejected")
    elif isinstance(chosen, list):
        prompt, first, second = _split_messages(
            fields.messages(chosen, "chosen"), fields.messages(rejected, "rejected")
        )
    else:
        prompt, first, second = _split_transcripts(fields.text(values, "chosen"), fields.text(values, "rejected"))
    tie = fields.has(values, "tie") and fields.flag(values, "tie")
    if first == second and not tie:
        raise ValueError("`chosen` and `rejected` are the same, and `tie` is not set")
    margin = fields.number(values, "margin") if fields.has(values, "margin") else 0.0
    if tie and margin:
        raise ValueError("a tie has no `margin`")
    return PreferenceExample(prompt, (first, second), Pair(margin, 0.5 if tie else _confidence(values)), attribute)


def _confidence(values: Mapping[str, Any]) -> float:
    if not fields.has(values, "confidence"):
        return 1.0
    confidence = fields.number(values, "confidence")
    if not 0.5 <= confidence <= 1:
        raise ValueError(
            f"`confidence` is {confidence:g}: it is the probability that `chosen` is the better one, from 0.5 to 1"
        )
    return confidence


def _ranking(values: Mapping[str, Any], attribute: str, open_ties: bool) -> PreferenceExample:
    prompt, responses = fields.prompt(values), _responses(values)
    ranks = fields.numbers(values, "ranks")
    if len(ranks) != len(responses):
        raise ValueError(f"{len(ranks)} `ranks` for {len(responses)} `responses`")
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    sizes = tuple(len(list(group)) for _, group in groupby(ranks[i] for i in order))
    open_ties = _ties(values) if fields.has(values, "ties") else open_ties
    if open_ties and len(sizes) == 1:
        raise ValueError("all `ranks` are equal, which says nothing where the order of ties is unknown")
    if open_ties and max(sizes[:-1]) > MOST_OPEN:
        raise ValueError(f"a tie of {max(sizes[:-1])}: one of unknown order may have {MOST_OPEN}, but for the last")
    return PreferenceExample(prompt, tuple(responses[i] for i in order), Ranking(sizes, open_ties), attribute)


def _ties(values: Mapping[str, Any]) -> bool:
    if (said := values["ties"]) not in ("judged", "unknown"):
        raise ValueError(f"`ties` is {fields.shown(said)}; `judged` or `unknown` was expected")
    return said == "unknown"


def _choice(values: Mapping[str, Any], attribute: str) -> PreferenceExample:
    prompt, responses = fields.prompt(values), _responses(values)
    best = fields.number(values, "best")
    if best not in range(len(responses)):
        raise ValueError(f"`best` is {best:g}: an index of `responses`, from 0 to {len(responses) - 1}, was expected")
    first = responses.pop(int(best))
    return PreferenceExample(prompt, (first, *responses), Ranking((1, len(responses)), open=True), attribute)


def _rating(values: Mapping[str, Any]) -> PreferenceExample:
    prompt, response = fields.prompt(values), fields.reply(fields.present(values, "response"), "response")
    given = values["rating"]
    if not isinstance(given, dict):
        return PreferenceExample(prompt, (response,), Rating({OVERALL: fields.number(values, "rating")}))
    known = {name for name in given if fields.has(given, name)}
    if not known:
        raise ValueError("`rating` is an empty object")
    return PreferenceExample(prompt, (response,), Rating({name: fields.number(given, name) for name in sorted(known)}))


def _responses(values: Mapping[str, Any]) -> list[str]:
    given = fields.items(values, "responses")
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"`responses` is {fields.kind(given)}; a list of two or more was expected")
    return [fields.reply(response, f"responses[{i}]") for i, response in enumerate(given)]


def _split_messages(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    """The messages that both begin with, and the one reply that follows in each."""
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise ValueError(
            "`chosen` and `rejected` must be the same messages but for the last, or have a `prompt` beside"
        )
    return chosen[:-1], fields.reply(chosen[-1:], "chosen"), fields.reply(rejected[-1:], "rejected")


def _split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning up to its last turn of the assistant, and what follows in each."""
    cut = commonprefix([chosen, rejected]).rfind(TURN) + len(TURN)  # noqa: RUF071  # characters it is
    if cut < len(TURN):
        raise ValueError(f"no `prompt`, and no common beginning with a turn {TURN.strip()!r} to take it from")
    replies = fields.text({"chosen": chosen[cut:]}, "chosen"), fields.text({"rejected": rejected[cut:]}, "rejected")
    return chosen[:cut], *replies
