"""Transcripts in the format of HH-RLHF, with a line `Human: …` or `Assistant: …` after each blank line."""

import re

from rewards.preferences import TURN

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript_roles(text: str) -> list[str]:
    """Who speaks, in order; nobody in a text that is no transcript."""
    if not text.startswith("\n\nHuman:"):
        return []
    return [ROLES[name] for name in SPEAKER.findall(text)]


def last_reply(text: str) -> str:
    """The assistant's last reply in a transcript; other texts as they are."""
    return text.rpartition(TURN)[2] if text.startswith("\n\nHuman:") else text
