"""Prompts and responses as text; `policies.text.encoder` turns them into tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # settings are validated before transformers is imported
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""A turn of a conversation, with at least `role` and `content`."""
Prompt = str | list[Message]


def decode_response(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of a response without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, for people and for functions that score text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
