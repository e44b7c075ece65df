"""What people prefer: pairs of responses, as rows of data have them."""

from collections.abc import Mapping
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from policies import fields
from policies.encoding import Message, Prompt

TURN = "\n\nAssistant:"
"""What begins a reply in a transcript of HH-RLHF's form."""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, the preferred one first.

    margin: by how much it should score higher at least. tie: the annotator saw no difference.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    tie: bool = False


def parse_pair(values: Mapping[str, Any]) -> Pair:
    """`chosen` and `rejected` after `prompt`, or as whole transcripts without it; optional `margin` and `tie`.

    Raises ValueError with a reason for people.
    """
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
    return Pair(prompt, first, second, margin, tie)


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
