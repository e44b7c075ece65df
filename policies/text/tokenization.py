"""Text to tokens: the one encoding that training, scoring and sampling share."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
"""A turn of a conversation, with at least `role` and `content`."""
Prompt = str | list[Message]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text, which gets the special tokens that the tokenizer adds by itself; or messages, which the chat
            template renders, up to where the assistant's reply begins.

    Returns:
        Its ids; for an empty text the BOS token, or EOS where there is none, so that a model can start from it.

    Raises:
        ValueError: The prompt is a list of messages, and the tokenizer has no chat template, or one that fails on them.
    """
    ids = _encode_text(tokenizer, prompt) if isinstance(prompt, str) else _encode_messages(tokenizer, prompt)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start]


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = list(tokenizer(text)["input_ids"])
    # Some tokenizers end every text with EOS, but the response continues the prompt.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    if not tokenizer.chat_template:
        raise ValueError("the prompt is a list of messages, but the tokenizer has no chat template")
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError) as error:  # templates reject messages by raising, or fail on unexpected values
        raise ValueError(f"the chat template fails on these messages: {error}") from error
    return list(encoded["input_ids"])


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """The tokens of a complete response; the last one is EOS."""
    ids: list[int] = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string, for people and for functions that score text."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
