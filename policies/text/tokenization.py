"""Text to tokens: the one encoding that training, scoring and sampling share."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Prompt = str | list[Message]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a prompt: plain text with the tokenizer's own special tokens, messages by the chat template.

    Raises ValueError for messages where the tokenizer has no chat template, or one that fails on them.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # Some tokenizers end every text with EOS; the response goes on from the prompt, so it must not.
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]
    else:
        if not tokenizer.chat_template:
            raise ValueError("the prompt is a list of messages, and the tokenizer has no chat template")
        try:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        except (TemplateError, TypeError) as error:  # templates refuse by raising; what they compute may fail, too
            raise ValueError(f"the chat template fails on these messages: {error}") from error
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return list(ids) or [start]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """The tokens of a whole response, with EOS as the last."""
    ids = list(tokenizer(response, add_special_tokens=False)["input_ids"])
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of a response without special tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string for people and for functions that score text."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
