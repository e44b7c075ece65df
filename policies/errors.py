"""Mistakes in what the user provides, and failures in Ray actors."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.exceptions import RayTaskError

NODE = re.compile(r"\bip=([^\s,)]+)")
"""The node's address in the first line of a RayTaskError, which has it nowhere else."""


class UserError(Exception):
    """A mistake in a file, key, row or folder that the user provides.

    The message says what is wrong, where (file, line, key), and what would be right. The command prints it without a
    traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of a library's error message; the name of the exception where the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


class ActorError(RuntimeError):
    """What has failed in a Ray actor. The message names the exception, what it says, the actor and its node."""


def actor_failure(error: "RayTaskError", actor: str) -> UserError | ActorError:
    """Describe an exception that a Ray actor has raised by what it is, without what Ray writes around it.

    Args:
        error: The exception, as Ray raises it.
        actor: What the actor is: `a rollout worker`.

    Returns:
        A UserError for a UserError, and an ActorError for any other exception.
    """
    cause: BaseException = error.cause
    node = NODE.search(str(error))
    where = f"in {actor} on node {node[1]}" if node else f"in {actor}"
    if isinstance(cause, UserError):
        return UserError(f"{cause} ({where})")
    return ActorError(f"{type(cause).__name__}: {first_line(cause)} ({where})")
