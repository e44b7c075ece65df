"""What a caller gives a trained run to respond to or to score, checked before any model is loaded."""

import re
from collections.abc import Sequence

from policies.errors import UserError
from policies.text import columns
from policies.text.columns import kind

UNDECODED = re.compile("[\udc80-\udcff]")
"""A byte that is not UTF-8, as Python reads it from the command line and from standard input."""


def check_text(text: object, name: str) -> None:
    """Raise UserError where a value is not text, or is text that UTF-8 cannot hold.

    Args:
        text: The value.
        name: What it is, for the message.
    """
    if not isinstance(text, str):
        raise UserError(f"{name} is {kind(text)}; text was expected")
    if undecoded := UNDECODED.search(text):
        raise UserError(f"{name} is not UTF-8: it has the byte 0x{ord(undecoded.group()) - 0xDC00:02x}")
    if columns.SURROGATE.search(text):
        raise UserError(f"{name} has half of a surrogate pair, which UTF-8 cannot hold")


def check_prompt(prompt: object, name: str) -> None:
    """Raise UserError where a value is neither text nor a list of messages with the texts `role` and `content`.

    Args:
        prompt: The value.
        name: What it is, for the message.
    """
    if isinstance(prompt, str):
        check_text(prompt, name)
        return
    if not isinstance(prompt, list):
        raise UserError(f"{name} is {kind(prompt)}; text or a list of messages was expected")
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    for content in contents:
        if isinstance(content, str):
            check_text(content, name)
    try:
        columns.messages(prompt, "prompt")
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def check_lists(**lists: Sequence[object] | None) -> None:
    """Check arguments that have one item per prompt.

    Args:
        lists: The arguments by name, the prompts first; None: not given.

    Raises:
        TypeError: One of them is a text, of which each character would be an item.
        UserError: They differ in length.
    """
    lengths: dict[str, int] = {}
    for name, items in lists.items():
        if isinstance(items, str):
            raise TypeError(f"{name} is one text; a list was expected: [{columns.shown(items)}]")
        if items is not None:
            lengths[name] = len(items)
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise UserError(f"one item per prompt was expected in each list, not {counts}")


def check_room(name: str, tokens: int, new_tokens: int, positions: int | None) -> None:
    """Raise UserError where a prompt leaves no room for its response in the model's context.

    Args:
        name: What the prompt is, for the message.
        tokens: How many tokens the prompt has.
        new_tokens: How many the response may have.
        positions: The context length in tokens; None: unlimited.
    """
    if positions is None or tokens + new_tokens <= positions:
        return
    room = positions - tokens
    advice = f", or allow at most {room} (max_new_tokens, --max-new-tokens)" if room > 0 else ""
    raise UserError(
        f"{name} has {tokens} tokens, which leaves no room for {new_tokens} new ones in the model's context length, "
        f"{positions}: shorten it{advice}"
    )


def check_fits(subject: str, tokens: int, positions: int | None) -> None:
    """Raise UserError where a prompt with its response does not fit the model's context.

    Args:
        subject: What has the tokens, with its verb.
        tokens: How many they are.
        positions: The context length in tokens; None: unlimited.
    """
    if positions is not None and tokens > positions:
        raise UserError(f"{subject} {tokens} tokens, and the model's context length is {positions}: shorten them")
