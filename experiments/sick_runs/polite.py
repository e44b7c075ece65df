"""Reward functions of the runs."""

from collections.abc import Mapping, Sequence
from typing import Any


def polite(prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[float]:
    """A harmless second term: whether a response opens politely."""
    return [float(response.startswith((" Thank", " Hello", " Good"))) for response in responses]
