"""The input of a classifier: prompt and response as its own tokenizer and chat template write them, made to fit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from policies.errors import UserError
from policies.text.tokenization import Message, Prompt, prompt_text


class ClassifierText(NamedTuple):
    """The input of a classifier.

    Attributes:
        ids: Token ids.
        shortened: Whether the start of the prompt was left out, because the model has too few positions.
    """

    ids: list[int]
    shortened: bool


@dataclass(frozen=True)
class ClassifierEncoder:
    """Encodes prompts and responses for a classifier.

    Attributes:
        tokenizer: The classifier's tokenizer.
        room: The largest number of tokens that the model can read; None: no limit.
        key: The setting that names the classifier, for messages.
    """

    tokenizer: PreTrainedTokenizerBase
    room: int | None
    key: str

    def encode(self, prompt: Prompt, response: str) -> ClassifierText:
        """Encode a prompt and its response.

        Where both do not fit, the earliest exchanges of a conversation are left out first, then the start of the text
        that is left, system messages last. The response, the special tokens and the template stay complete.

        Raises:
            UserError: The response alone does not fit, or the chat template fails on the messages.
        """
        if self.tokenizer.chat_template:
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            return self._fit_messages(messages, response)
        return self._fit_texts([prompt_text(prompt)], lambda texts: self._encode_text(texts[0] + response))

    def _fit_messages(self, messages: list[Message], response: str) -> ClassifierText:
        ids = self._render(messages, response)
        if self._fits(ids):
            return ClassifierText(ids, shortened=False)
        while (remaining := without_first_exchange(messages)) is not None:
            messages = remaining
            ids = self._render(messages, response)
            if self._fits(ids):
                return ClassifierText(ids, shortened=True)
        order = sorted(range(len(messages)), key=lambda i: messages[i]["role"] == "system")

        def encode(texts: list[str]) -> list[int]:
            shortened = [dict(message) for message in messages]
            for i, text in zip(order, texts, strict=True):
                shortened[i]["content"] = text
            return self._render(shortened, response)

        return self._fit_texts([messages[i]["content"] for i in order], encode)

    def _fit_texts(self, texts: list[str], encode: Callable[[list[str]], list[int]]) -> ClassifierText:
        """Encode texts, cut from the start of the first, then of the next, until they fit."""
        ids = encode(texts)
        shortened = False
        for i in range(len(texts)):
            while texts[i] and self.room is not None and len(ids) > self.room:
                texts[i] = self._without_first_tokens(texts[i], len(ids) - self.room)
                ids = encode(texts)
                shortened = True
        if not self._fits(ids):
            raise UserError(
                f"{self.key}: a response is {len(ids)} tokens long as the classifier reads it, without any prompt; its "
                f"model has {self.room} positions: lower rollouts.max_new_tokens, or choose another classifier"
            )
        return ClassifierText(ids, shortened)

    def _without_first_tokens(self, text: str, count: int) -> str:
        """A text without its first tokens; at least one character is left out."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
            return text[max(1, offsets[count][0]) :] if count < len(offsets) else ""
        tokens = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return text[max(1, len(text) * count // max(1, tokens)) :]

    def _fits(self, ids: list[int]) -> bool:
        return self.room is None or len(ids) <= self.room

    def _encode_text(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def _render(self, messages: list[Message], response: str) -> list[int]:
        conversation = [*messages, {"role": "assistant", "content": response}]
        try:
            return list(self.tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"])
        except (TemplateError, TypeError) as error:  # templates reject messages by raising
            raise UserError(f"{self.key}: its chat template fails on these messages: {error}") from error


def without_first_exchange(messages: list[Message]) -> list[Message] | None:
    """A conversation without its first user turn and the replies to it; None if it has no other user turn.

    System messages stay.
    """
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(users) < 2:
        return None
    system = [message for message in messages[: users[1]] if message["role"] == "system"]
    return system + messages[users[1] :]
