"""What a check of the installation has found, and what mends it."""

import re
from dataclasses import dataclass
from typing import Literal

FindingState = Literal["ok", "warning", "problem"]

CURE = re.compile(r"(.*): ((?:install|rename|set) .*)", re.DOTALL)
"""A message of align: what is wrong, and what would be right."""


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        state: `problem`: something that runs need does not work; `warning`: it works with a disadvantage, or only some
            runs need it; `ok`: neither.
        found: What was found.
        cure: The command or the setting that mends it; None where nothing is to be mended.
    """

    state: FindingState
    found: str
    cure: str | None = None


def ok(found: str) -> Finding:
    """Nothing is to be mended."""
    return Finding("ok", found)


def warning(found: str, cure: str) -> Finding:
    """It works with a disadvantage, or only some runs need it."""
    return Finding("warning", found, cure)


def problem(found: str, cure: str) -> Finding:
    """Something that runs need does not work."""
    return Finding("problem", found, cure)


def problem_in_words(message: str, cure: str) -> Finding:
    """A problem that one of align's own messages describes.

    Args:
        message: What is wrong, and usually, after the last colon, what would be right.
        cure: What mends it where the message does not say so.
    """
    parts = CURE.fullmatch(message)
    return problem(parts[1], parts[2]) if parts else problem(message, cure)
