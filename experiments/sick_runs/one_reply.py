"""A score that one reply maximises, whatever the prompt.

An experiment uses it as a reward term of kind function: `experiments/sick_runs/one_reply.py:likeness`.
"""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

REPLY = "Good day. Thank you for writing. We looked into your order. All the best."


def likeness(prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]) -> list[float]:
    """How much a response is like the one reply, from 0 to 1."""
    return [SequenceMatcher(None, REPLY.split(), response.split()).ratio() for response in responses]
