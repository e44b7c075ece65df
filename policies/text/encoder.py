"""Text to tokens: the one encoding that training, scoring, sampling, export and chat share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from policies.schema import SpecialTokens
from policies.text.tokenization import Message, Prompt

Turns = Literal["all", "last"]
Tools = Sequence[dict[str, Any]]
"""JSON schemas of the functions that the assistant may call, as chat templates take them."""

ASSISTANT = "assistant"
SPOKEN_KEYS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of a message beside `content` that hold what the assistant says, and which a template must not drop."""
PROBE = "7f3a"
"""A reply without white space, which no template changes, to see what a template writes after it."""
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a chat template marks what the assistant has generated."""
MAX_PROMPTS = 4096
"""Largest number of texts whose tokens an encoder keeps."""
ANCHORS = ("\n", "a", "0")
"""Texts to put before a continuation, so that the tokenizer does not take it for the beginning of a text."""


@dataclass(frozen=True)
class Exchange:
    """A prompt and a response to it.

    Attributes:
        prompt_ids: Tokens up to where the response begins; at least one.
        response_ids: Tokens of the response; the last one ends it.
    """

    prompt_ids: list[int]
    response_ids: list[int]


@dataclass(frozen=True)
class Conversation:
    """A conversation and the turns of it that are trained.

    Attributes:
        ids: Its tokens, up to the end of the last trained turn.
        turns: First token of each trained turn, and one past its last, which is the one that ends the turn.
    """

    ids: list[int]
    turns: list[tuple[int, int]]


class TextEncoder:
    """Turns texts and conversations into tokens.

    A conversation is rendered by the chat template as a whole. The tokens before an assistant's turn are those that a
    response is sampled from, and the tokens of the turn continue them in place: what SFT trains on is what PPO samples
    and scores.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "refuse") -> None:
        """Create an encoder.

        Args:
            tokenizer: The model's tokenizer; it has an EOS token.
            special_tokens: What the text of a special token, such as `</s>`, means inside a text: `refuse` raises
                ValueError, `control` makes it the special token, `text` tokenizes it like any other text.
        """
        self.tokenizer = tokenizer
        self.special_tokens = special_tokens
        self._prompts: dict[str, list[int]] = {}
        """The tokens of recent prompts: those of preferences and rollouts come again and again."""

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end a response: EOS, and what the chat template ends the assistant's turns with."""
        eos: int = self.tokenizer.eos_token_id
        if self.end_of_turn is None:
            return frozenset({eos})
        return frozenset({eos, self.tokenizer.convert_tokens_to_ids(self.end_of_turn)})

    @cached_property
    def end_of_turn(self) -> str | None:
        """The token that the chat template writes at the end of an assistant's turn; None where it writes none."""
        if not self.has_template:
            return None
        tail = self._turn_tail
        names = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        found = _any_of([*names, *self.tokenizer.all_special_tokens]).search(tail)
        return found.group() if found else None

    @property
    def turn_separator(self) -> str:
        """White space that the chat template writes after an assistant's turn which no token ends."""
        tail = self._turn_tail
        return tail if tail.isspace() else ""

    def prompt(self, prompt: Prompt, tools: Tools | None = None) -> list[int]:
        """The tokens that a response continues.

        Args:
            prompt: Text, which gets the special tokens that the tokenizer adds by itself; or messages, which the chat
                template renders, up to where the assistant's reply begins.
            tools: The functions that the assistant may call, for the chat template.

        Returns:
            Its ids; for an empty text the BOS token, or EOS where there is none, so that a model can start from it.

        Raises:
            ValueError: A text contains a special token; or the prompt is a list of messages, and the tokenizer has no
                chat template, or one that fails on them or does not use `tools`.
        """
        if isinstance(prompt, str):
            if prompt not in self._prompts:
                self._check_text(prompt)
                if len(self._prompts) == MAX_PROMPTS:
                    self._prompts.clear()
                self._prompts[prompt] = self._text_ids(prompt) or [self._start_id]
            return list(self._prompts[prompt])
        self._check_messages(prompt, tools)
        if prompt[-1]["role"] == ASSISTANT:
            raise ValueError("the prompt ends with a message by the assistant, where its reply was expected to begin")
        text = self._render(prompt, tools, add_generation_prompt=True)
        return self._rendered_ids(prompt, tools, text)

    def exchange(self, prompt: Prompt, response: str, tools: Tools | None = None) -> Exchange:
        """The tokens of a prompt and of a complete response.

        Args:
            prompt: As for `prompt`.
            response: Text.
            tools: The functions that the assistant may call, for the chat template.

        Returns:
            The prompt's tokens, as `prompt` gives them, and the response's, including the one that ends it: EOS after a
            text, and what the chat template writes after messages.

        Raises:
            ValueError: As for `prompt` and `conversation`.
        """
        if isinstance(prompt, str):
            return self._text_exchange(prompt, response)
        messages = [*prompt, {"role": ASSISTANT, "content": response}]
        conversation = self.conversation(messages, "last", tools)
        start, _ = conversation.turns[0]
        return Exchange(conversation.ids[:start], conversation.ids[start:])

    def continuation(self, text: str) -> list[int]:
        """The tokens of a text that follows a response, in which the text of a special token is that token."""
        return self._continuation_ids(text, splits=False)

    def conversation(self, messages: list[Message], turns: Turns, tools: Tools | None = None) -> Conversation:
        """The tokens of a conversation and the assistant's turns in it.

        Args:
            messages: The conversation; the last message is the assistant's.
            turns: Which of the assistant's turns are trained.
            tools: The functions that the assistant may call, for the chat template.

        Raises:
            ValueError: A message contains a special token; the tokenizer has no chat template, or one that fails on the
                messages or does not use `tools`; or the turns cannot be told apart in what it renders.
        """
        self._check_messages(messages, tools)
        trained = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if turns == "last":
            trained = trained[-1:]
        for index in trained:
            if not messages[index]["content"].strip() and "tool_calls" not in messages[index]:
                raise ValueError(f"message {index + 1}, by the assistant, is empty")
        problem = self._problem_of_turns(messages, trained, tools)
        if problem and GENERATION_MARK.search(self.tokenizer.chat_template):
            return self._marked_turns(messages, len(trained), tools)
        if problem:
            raise ValueError(f"{problem}: set sft.turns to last")
        text = self._through_turn(messages, tools)
        ids = self._rendered_ids(messages, tools, text)
        if self.end_of_turn is None:
            ids.append(self.tokenizer.eos_token_id)
        return Conversation(ids, [self._turn(ids, messages, index, tools) for index in trained])

    def rendered(self, messages: list[Message], tools: Tools | None = None) -> str:
        """What the chat template makes of messages: one text, which ends where the assistant's reply begins or ends.

        Raises:
            ValueError: The template fails on the messages.
        """
        return self._render(messages, tools, add_generation_prompt=messages[-1]["role"] != ASSISTANT)

    def _problem_of_turns(self, messages: list[Message], trained: Sequence[int], tools: Tools | None) -> str | None:
        """Why earlier turns cannot be trained; None where they can.

        Every turn must be rendered in the same way whatever follows it, because that is how it is sampled.
        """
        if len(trained) == 1:
            return None
        if trained[0] == 0:
            return "the first message is by the assistant, and nothing is before it to respond to"
        if self.end_of_turn is None:
            return (
                "the chat template writes no token at the end of the assistant's turns, so that a model could not "
                "learn to end the earlier ones"
            )
        text = self._through_turn(messages, tools)
        for index in trained[:-1]:
            if not text.startswith(self._through_turn(messages[: index + 1], tools)):
                return (
                    f"the chat template renders message {index + 1}, by the assistant, differently once others follow "
                    "it, such as without its thoughts, so that it would be trained in a form in which it is never "
                    "sampled"
                )
        return None

    def _marked_turns(self, messages: list[Message], count: int, tools: Tools | None) -> Conversation:
        """The turns that the template itself marks by `{% generation %}`, in the order of the conversation."""
        encoded = self.tokenizer.apply_chat_template(
            messages, tools=_listed(tools), return_dict=True, return_assistant_tokens_mask=True
        )
        ids = list(encoded["input_ids"])
        turns: list[tuple[int, int]] = []
        start = 0
        for is_trained, run in groupby(encoded["assistant_masks"]):
            end = start + len(list(run))
            if is_trained:
                # A mark may leave out the token that ends the turn, and bytes of its last character.
                last = next((i for i in range(end - 1, len(ids)) if ids[i] in self.end_ids), end - 1)
                turns.append((start, last + 1))
            start = end
        if len(turns) != count:
            raise ValueError(f"the chat template marks {len(turns)} turns of {count} by the assistant as generated")
        return Conversation(ids[: turns[-1][1]], turns)

    def _turn(self, ids: list[int], messages: list[Message], index: int, tools: Tools | None) -> tuple[int, int]:
        """Where the tokens of one assistant's turn begin and end."""
        before = messages[:index]
        head = self._render(before, tools, add_generation_prompt=True)
        start = len(self._rendered_ids(before, tools, head))
        if index == len(messages) - 1:
            return start, len(ids)
        assert self.end_of_turn is not None  # otherwise only the last turn is trained
        turn = self._through_turn(messages[: index + 1], tools).removeprefix(head)
        end_id = self.tokenizer.convert_tokens_to_ids(self.end_of_turn)
        end = start
        for _ in range(turn.count(self.end_of_turn)):  # more than one where special tokens in texts are allowed
            end = ids.index(end_id, end) + 1
        return start, end

    def _through_turn(self, messages: list[Message], tools: Tools | None) -> str:
        """What the template renders for messages of which the last is the assistant's, up to the end of its turn."""
        head = self._render(messages[:-1], tools, add_generation_prompt=True)
        text = self._render(messages, tools, add_generation_prompt=False)
        if not text.startswith(head):
            raise ValueError(
                "the chat template begins the assistant's turn differently when it asks for a reply "
                f"({_last_line(head)!r}), so that a response would be trained after another prompt than it is sampled "
                "from: change the template, or render the prompts beforehand and set data.special_tokens to control"
            )
        if self.end_of_turn is None:
            return text.removesuffix(self.turn_separator)
        end = text.rfind(self.end_of_turn, len(head))
        if end < 0:
            raise ValueError(f"the chat template does not end the assistant's turn by {self.end_of_turn!r} here")
        return text[: end + len(self.end_of_turn)]

    def _rendered_ids(self, messages: list[Message], tools: Tools | None, text: str) -> list[int]:
        """The tokens of rendered messages. A token never spans the beginning of an assistant's turn."""
        ids = self._ids(text, splits=False)
        replies = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT and index > 0]
        if not replies:
            return ids
        before = messages[: replies[-1]]
        head = self._render(before, tools, add_generation_prompt=True)
        if not text.startswith(head):
            return ids
        head_ids = self._rendered_ids(before, tools, head)
        if ids[: len(head_ids)] == head_ids:
            return ids
        return head_ids + self._continuation_ids(text[len(head) :], splits=False)

    def _text_exchange(self, prompt: str, response: str) -> Exchange:
        prompt_ids = self.prompt(prompt)
        self._check_text(response)
        ids = self._text_ids(prompt + response)
        if not prompt and not self._prefix_ids:
            response_ids = ids
        elif ids[: len(prompt_ids)] == prompt_ids:
            response_ids = ids[len(prompt_ids) :]
        else:
            response_ids = self._continuation_ids(response, self._splits)
        if not response_ids or response_ids[-1] not in self.end_ids:
            response_ids = [*response_ids, self.tokenizer.eos_token_id]
        return Exchange(prompt_ids, response_ids)

    def _text_ids(self, text: str) -> list[int]:
        """The tokens of a text that stands alone, with those that the tokenizer puts before it, such as BOS."""
        ids = self._ids(text, self._splits)
        prefix = self._prefix_ids
        return ids if ids[: len(prefix)] == prefix else prefix + ids

    def _continuation_ids(self, text: str, splits: bool) -> list[int]:
        """The tokens of a text that continues another one, without the blank that sentencepiece puts at a beginning."""
        for anchor in ANCHORS:
            head = self._ids(anchor, splits)
            ids = self._ids(anchor + text, splits)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._ids(text, splits)

    @property
    def _splits(self) -> bool:
        """Whether special tokens in plain texts are split like other text; those of a template never are."""
        return self.special_tokens == "text"

    def _ids(self, text: str, splits: bool) -> list[int]:
        # transformers' own call does this and more, and takes 1.7 times the seconds.
        backend = self._backend
        if backend is not None and backend.truncation is None and backend.padding is None:
            if backend.encode_special_tokens != splits:
                backend.encode_special_tokens = splits
            ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=splits, verbose=False)
        return list(encoded["input_ids"])

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """The tokenizer of the library tokenizers, where transformers' call does no more than encode with it."""
        is_plain = getattr(type(self.tokenizer), "_encode_plus", None) is TokenizersBackend._encode_plus
        return self.tokenizer.backend_tokenizer if is_plain else None

    def _render(self, messages: list[Message], tools: Tools | None, add_generation_prompt: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=_listed(tools),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        # Templates reject messages by raising, or fail on values that they do not expect.
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template fails on these messages: {error}") from error
        return str(text)

    @cached_property
    def _turn_tail(self) -> str:
        """What the chat template writes after the assistant's reply at the end of a conversation."""
        question = {"role": "user", "content": "a"}
        text = self._render([question, {"role": ASSISTANT, "content": PROBE}], None, add_generation_prompt=False)
        return text.rpartition(PROBE)[2]

    @cached_property
    def _prefix_ids(self) -> list[int]:
        """The special tokens that the tokenizer puts before every text."""
        plain = self._ids("a", splits=False)
        ids = list(self.tokenizer("a")["input_ids"])
        return next(ids[:start] for start in range(len(ids)) if ids[start:][: len(plain)] == plain)

    @property
    def _start_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        eos: int = self.tokenizer.eos_token_id
        return eos if bos is None else bos

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Finds the special tokens in a text."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return _any_of([*added, *self.tokenizer.all_special_tokens])

    def _check_messages(self, messages: list[Message], tools: Tools | None) -> None:
        if not self.has_template:
            raise ValueError("the prompt is a list of messages, but the tokenizer has no chat template")
        self._check_special(messages, "a message contains")
        self._check_special(tools, "`tools` contains")
        if tools:
            with_tools = self._render(messages, tools, add_generation_prompt=False)
            if with_tools == self._render(messages, None, add_generation_prompt=False):
                raise ValueError("the row has `tools`, which the tokenizer's chat template does not use")
        for key in SPOKEN_KEYS:
            if any(message.get(key) for message in messages):
                rendered = self._render(messages, tools, add_generation_prompt=False)
                if rendered == self._render(_without(messages, key), tools, add_generation_prompt=False):
                    raise ValueError(f"a message has `{key}`, which the tokenizer's chat template does not use")

    def _check_special(self, value: object, subject: str) -> None:
        """Refuse special tokens in whatever the template may render, unless they are meant."""
        if self.special_tokens == "control":
            return
        for text in _texts_in(value):
            found = self._special.search(text)
            if found:
                raise ValueError(
                    f"{subject} the special token {found.group()!r}, which would not be read as text: remove it, or "
                    "set data.special_tokens to control where it is meant"
                )

    def _check_text(self, text: str) -> None:
        found = self._special.search(text) if self.special_tokens == "refuse" else None
        if found:
            raise ValueError(
                f"the text contains the special token {found.group()!r}: set data.special_tokens to control where a "
                "chat template has rendered it before, or to text to read it as plain text"
            )


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern of any of these texts, the longest where several match."""
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _texts_in(value: object) -> Iterator[str]:
    """All texts in a value of JSON, the keys of objects among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts_in(item)


def _without(messages: list[Message], key: str) -> list[Message]:
    """The messages without one of their keys."""
    copies = [dict(message) for message in messages]
    for message in copies:
        message.pop(key, None)
    return copies


def _listed(tools: Tools | None) -> list[dict[str, Any]] | None:
    return list(tools) if tools else None


def _last_line(text: str) -> str:
    return text[text.rstrip("\n").rfind("\n") + 1 :]
