"""Replies to responses, as the user's function of an environment returns them."""

from collections.abc import Sequence
from typing import Any

from rewards.user_functions import Failure, shown_result


def read_replies(result: Any, responses: Sequence[str]) -> list[str | None] | Failure:
    """Check what a function has returned: for each response a text that follows it, or None where it is complete.

    Args:
        result: Anything.
        responses: Texts `[B]`.

    Returns:
        The reply to each response, or why the result is something else.
    """
    if not isinstance(result, Sequence) or isinstance(result, str | bytes):
        return Failure(f"returned {shown_result(result)}; a list with one text or None per response was expected")
    if len(result) != len(responses):
        return Failure(f"returned {len(result)} replies to {len(responses)} responses")
    replies: list[str | None] = []
    for reply, response in zip(result, responses, strict=True):
        if not (reply is None or (isinstance(reply, str) and reply)):
            return Failure(
                f"returned {shown_result(reply)} as the reply to {response[:80]!r}; a text that is not empty, or None "
                "for a response that is complete, was expected"
            )
        replies.append(reply)
    return replies
