"""Rows of data as tokens: demonstrations, preference examples and requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from align.config.classify_settings import ClassifySettings
from align.config.dpo_settings import DpoSettings
from align.config.schema import SftSettings
from align.data.labels import Label, LabelledText
from align.data.parsing import RowTooLong, Transcript, parse_demonstration, parse_prompt
from policies.batching import Batch, collate_turns
from policies.text import columns
from policies.text.alignment import TextAlignment
from policies.text.encoder import ASSISTANT, TextEncoder, Tools
from policies.text.tokenization import Prompt
from rewards.preferences import (
    OVERALL,
    TIE,
    Pair,
    Preference,
    PreferenceExample,
    Ranking,
    Rating,
    parse_preference,
)
from rewards.rankings import MAX_OPEN_TIE
from rewards.schema import RewardSettings
from rewards.step_labels import LabelledSteps, labelled_ends, parse_steps, step_ends
from rewards.terms.process import ProcessTerm
from rollouts.schema import RolloutSettings
from rollouts.trajectory import Request


@dataclass(frozen=True)
class TokenizedDemonstration:
    """A demonstration as token ids.

    Attributes:
        ids: Tokens of the conversation.
        turns: First token of each turn that is trained, and one past its last, which is the one that ends the turn.
        was_cut: Whether it had more tokens than fit.
        dataset: The name of its dataset in a mixture; empty otherwise.
    """

    ids: list[int]
    turns: list[tuple[int, int]]
    was_cut: bool = False
    dataset: str = ""

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss is over."""
        return sum(end - start for start, end in self.turns)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens before the first trained turn."""
        start, _ = self.turns[0]
        return self.ids[:start]

    @property
    def is_text(self) -> bool:
        """Whether it is a text without a prompt, all of which is trained but for the token that it begins with."""
        return self.turns == [(1, self.length)]


@dataclass(frozen=True)
class TokenizedPreference:
    """A preference example with its token ids.

    Attributes:
        example: The prompt, the responses and the preference between them.
        prompt_ids: Tokens of the prompt.
        responses_ids: Tokens of each response, in the example's order.
        shares_prompt: Whether all responses follow one copy of the prompt, rather than a copy each.
    """

    example: PreferenceExample
    prompt_ids: list[int]
    responses_ids: list[list[int]]
    shares_prompt: bool = True

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass, padding included."""
        if self.shares_prompt:
            return len(self.prompt_ids) + sum(map(len, self.responses_ids))
        return len(self.responses_ids) * (len(self.prompt_ids) + max(map(len, self.responses_ids)))


@dataclass(frozen=True)
class TokenizedSteps:
    """A response in labelled steps as token ids.

    Attributes:
        example: The prompt, the steps and their labels.
        ids: Tokens of prompt and response.
        prompt_length: Number of tokens of the prompt.
        ends: Index into `ids` of the token that completes each labelled step, increasing.
        labels: The labels of these steps.
        has_inner_marks: Whether a step contains what separates steps, so that more steps would be read in it.
    """

    example: LabelledSteps
    ids: list[int]
    prompt_length: int
    ends: list[int]
    labels: list[float]
    has_inner_marks: bool = False

    @property
    def length(self) -> int:
        """Number of tokens in its forward pass."""
        return len(self.ids)

    @property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self.ids[: self.prompt_length]


Example = TypeVar("Example", TokenizedDemonstration, TokenizedPreference, TokenizedSteps, Request, LabelledText)
Parser = Callable[[Mapping[str, Any]], Example]
"""Turns a row's columns into an example; raises ValueError, with the reason, for an invalid row."""


def pack_demonstrations(demonstrations: Sequence[TokenizedDemonstration]) -> Batch:
    """Pack demonstrations; the response tokens of the batch are those that are trained."""
    sequences = [demonstration.ids for demonstration in demonstrations]
    turns = [demonstration.turns for demonstration in demonstrations]
    return collate_turns(sequences, turns)


@dataclass(frozen=True)
class Limit:
    """The most tokens that a row may have.

    Attributes:
        tokens: The number.
        name: The setting, or the property of the model, that it comes from.
        key: The setting that can raise it; None where the model is the limit.
    """

    tokens: int
    name: str
    key: str | None = None

    def check(self, tokens: int) -> None:
        """Raise RowTooLong where a row has more tokens."""
        if tokens > self.tokens:
            raise RowTooLong(f"{tokens} tokens are more than {self.name}, {self.tokens}", self.key, tokens)


def demonstration_parser(
    encoder: TextEncoder, settings: SftSettings, max_positions: int | None
) -> Parser[TokenizedDemonstration]:
    """A parser that turns a row's columns into a demonstration, for `parse_rows`.

    Args:
        encoder: Of the model's tokenizer.
        settings: Which turns are trained, and the most tokens.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit("sft.max_tokens", settings.max_tokens, max_positions)

    def parse(values: Mapping[str, Any]) -> TokenizedDemonstration:
        demonstration = tokenized_demonstration(encoder, settings, values)
        is_split = settings.truncate == "split" and demonstration.is_text
        if demonstration.length <= limit.tokens or is_split:
            return demonstration
        if settings.truncate in ("start", "end"):
            return truncated(demonstration, limit.tokens, settings.truncate)
        limit.check(demonstration.length)
        return demonstration

    return parse


def truncated(
    demonstration: TokenizedDemonstration, tokens: int, where: Literal["start", "end"]
) -> TokenizedDemonstration:
    """The first tokens of a demonstration, or with `start` cut off its last.

    Raises ValueError where no trained token would be left, or none to predict the first of them from.
    """
    excess = demonstration.length - tokens if where == "start" else 0
    ids = demonstration.ids[excess : excess + tokens]
    within = turns_within(demonstration.turns, excess + 1, excess + tokens)  # a token is predicted from the one before
    turns = [(start - excess, end - excess) for start, end in within]
    if not turns:
        raise ValueError(f"its first {tokens} tokens have none that is trained, and sft.truncate cuts off its {where}")
    return TokenizedDemonstration(ids, turns, was_cut=True)


def turns_within(turns: Sequence[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """The parts of turns, each its first token and one past its last, that lie from `start` up to before `end`."""
    clipped = [(max(start, first), min(end, last)) for first, last in turns]
    return [(first, last) for first, last in clipped if first < last]


def pieces_of(demonstration: TokenizedDemonstration, tokens: int) -> list[TokenizedDemonstration]:
    """A text in pieces of at most so many tokens, each of which begins with the last token of the one before.

    So each token is trained once, as in the whole text. What is no text, or fits, is one piece.
    """
    if not demonstration.is_text or demonstration.length <= tokens:
        return [demonstration]
    pieces = []
    for start in range(0, demonstration.length - 1, tokens - 1):
        ids = demonstration.ids[start : start + tokens]
        pieces.append(replace(demonstration, ids=ids, turns=[(1, len(ids))], was_cut=True))
    return pieces


def tokenized_demonstration(
    encoder: TextEncoder, settings: SftSettings, values: Mapping[str, Any]
) -> TokenizedDemonstration:
    """The tokens of a row with a demonstration, of any length; raises ValueError where it is not valid."""
    row = parse_demonstration(values)
    if isinstance(row, Transcript):
        conversation = encoder.conversation(row.messages, settings.turns, row.tools)
        return TokenizedDemonstration(conversation.ids, conversation.turns)
    exchange = encoder.exchange(row.prompt, row.completion, row.tools)
    ids = exchange.prompt_ids + exchange.response_ids
    return TokenizedDemonstration(ids, [(len(exchange.prompt_ids), len(ids))])


def preference_parser(
    encoder: TextEncoder, settings: RewardSettings, max_positions: int | None
) -> Parser[TokenizedPreference]:
    """A parser that turns a row's columns into a preference example, for `parse_rows`.

    Args:
        encoder: Of the model's tokenizer.
        settings: Attributes, the meaning of ties, and the most tokens of a prompt with a response.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit("reward.max_tokens", settings.max_tokens, max_positions)

    def parse(values: Mapping[str, Any]) -> TokenizedPreference:
        example = parse_preference(values, open_ties=settings.ties == "unknown")
        _check_ties(example, settings)
        _check_attributes(example, settings)
        tools = columns.tools(values, example.prompt)
        exchanges = [encoder.exchange(example.prompt, response, tools) for response in example.responses]
        preference = TokenizedPreference(
            example=example,
            prompt_ids=exchanges[0].prompt_ids,
            responses_ids=[exchange.response_ids for exchange in exchanges],
        )
        longest = max(map(len, preference.responses_ids))
        limit.check(len(preference.prompt_ids) + longest)
        return preference

    return parse


def dpo_parser(
    parse: Parser[TokenizedPreference], settings: DpoSettings, max_positions: int | None
) -> Parser[TokenizedPreference]:
    """A parser that also checks that preference optimisation can learn from the example.

    Args:
        parse: Turns a row's columns into a preference example.
        settings: The loss, and the most tokens of a prompt with a response.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit("dpo.max_tokens", settings.max_tokens, max_positions)

    def parse_and_check(values: Mapping[str, Any]) -> TokenizedPreference:
        preference = parse(values)
        _check_loss(preference.example, settings)
        limit.check(len(preference.prompt_ids) + max(map(len, preference.responses_ids)))
        return preference

    return parse_and_check


def _check_loss(example: PreferenceExample, settings: DpoSettings) -> None:
    """Raise ValueError where the loss of preference optimisation cannot learn from an example."""
    preference = example.preference
    if isinstance(preference, Rating):
        if settings.loss != "kto":
            raise ValueError(f"dpo.loss {settings.loss} compares responses, and this is a rating of one: use kto")
        if not set(preference.values.values()) <= {0.0, 1.0} or len(preference.values) > 1:
            raise ValueError("dpo.loss kto reads one `rating` of a response, 0 (bad) or 1 (good)")
    if settings.loss == "kto" and is_tie(preference):
        raise ValueError("dpo.loss kto learns from good and bad responses, and all of these are equally good")


def is_tie(preference: Preference) -> bool:
    """Whether all responses of an example are equally good."""
    if isinstance(preference, Pair):
        return preference.certainty == TIE
    return isinstance(preference, Ranking) and len(preference.sizes) == 1


def _check_ties(example: PreferenceExample, settings: RewardSettings) -> None:
    preference = example.preference
    if settings.label_smoothing and isinstance(preference, Ranking) and preference.open:
        largest = max(preference.sizes)
        if largest > MAX_OPEN_TIE:
            raise ValueError(f"a tie of {largest}: with reward.label_smoothing, at most {MAX_OPEN_TIE} may tie")


def _check_attributes(example: PreferenceExample, settings: RewardSettings) -> None:
    for attribute in example.attributes:
        if attribute != OVERALL and attribute not in settings.attributes:
            valid = ", ".join(settings.attributes) or "none"
            raise ValueError(f"attribute {attribute!r} is not in reward.attributes ({valid})")


def step_parser(
    encoder: TextEncoder, term: ProcessTerm, max_tokens: int, max_positions: int | None
) -> Parser[TokenizedSteps]:
    """A parser that turns a row's columns into a response in labelled steps, for `parse_rows`.

    The response is tokenized as a whole, as the policy writes it, and a step is read at the token that completes its
    last character.

    Args:
        encoder: Of the model's tokenizer.
        term: What separates steps.
        max_tokens: The most tokens of a prompt with a response.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit("reward.max_tokens", max_tokens, max_positions)

    def parse(values: Mapping[str, Any]) -> TokenizedSteps:
        example = parse_steps(values)
        tools = columns.tools(values, example.prompt)
        exchange = encoder.exchange(example.prompt, example.text(term.separator), tools)
        ids = exchange.prompt_ids + exchange.response_ids
        limit.check(len(ids))
        alignment = TextAlignment(encoder.tokenizer, exchange.response_ids)
        characters = labelled_ends(alignment.text, example.steps)
        label_at: dict[int, float] = {}
        for end, label in zip(characters, example.labels, strict=True):
            if label is not None:
                token = len(exchange.prompt_ids) + alignment.completing_token(end)
                if token in label_at:
                    raise ValueError("one token completes two labelled steps: the separator does not separate them")
                label_at[token] = label
        return TokenizedSteps(
            example=example,
            ids=ids,
            prompt_length=len(exchange.prompt_ids),
            ends=list(label_at),
            labels=list(label_at.values()),
            has_inner_marks=step_ends(alignment.text, term.mark) != characters,
        )

    return parse


def labelled_text_parser(
    encoder: TextEncoder, settings: ClassifySettings, max_positions: int | None
) -> Parser[LabelledText]:
    """A parser that turns a row's columns into a labelled text, for `parse_rows`.

    Args:
        encoder: Of the model's tokenizer.
        settings: The task, and the most tokens of a text.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit("classify.max_tokens", settings.max_tokens, max_positions)

    def parse(values: Mapping[str, Any]) -> LabelledText:
        text = columns.text(values, "text") if columns.has(values, "text") else columns.prompt(values)
        ids = complete_ids(encoder, text, columns.tools(values, text))
        limit.check(len(ids))
        return LabelledText(text, ids, _label(values, settings))

    return parse


def complete_ids(encoder: TextEncoder, text: Prompt, tools: Tools | None = None) -> list[int]:
    """The tokens of a complete text or conversation, up to the one whose hidden state a head reads.

    A text ends with EOS, a conversation as the chat template ends an assistant's turn, or asks for a reply.
    Raises ValueError as `TextEncoder.prompt` does.
    """
    if isinstance(text, str):
        ids = encoder.prompt(text)
        return ids if ids[-1] in encoder.end_ids else [*ids, encoder.tokenizer.eos_token_id]
    if text[-1]["role"] == ASSISTANT:
        return encoder.conversation(text, "last", tools).ids
    return encoder.prompt(text, tools)


def _label(values: Mapping[str, Any], settings: ClassifySettings) -> Label:
    """The label in a row, as the task reads it."""
    if settings.task == "regression":
        return columns.number(values, "label")
    value = columns.present(values, "label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return columns.text(values, "label")
    if not isinstance(value, int | float):
        raise ValueError(f"`label` is {columns.kind(value)}; text or a number was expected")
    number = columns.number(values, "label")
    if isinstance(value, int):
        return value
    if settings.task == "classification":
        if number.is_integer():
            return int(number)
        raise ValueError(f"`label` is {value}, which is no class: text or an integer was expected")
    return number


def request_parser(encoder: TextEncoder, settings: RolloutSettings, max_positions: int | None) -> Parser[Request]:
    """A parser that turns a row's columns into a request without a seed, for `parse_rows`.

    Args:
        encoder: Of the model's tokenizer.
        settings: The most tokens of a prompt and of a response, which together must fit `max_positions`.
        max_positions: The model's context length in tokens, where it is known.
    """
    limit = _limit(
        "rollouts.max_prompt_tokens",
        settings.max_prompt_tokens,
        None if max_positions is None else max_positions - settings.max_new_tokens,
        room="the model's context length less rollouts.max_new_tokens",
    )

    def parse(values: Mapping[str, Any]) -> Request:
        row = parse_prompt(values)
        prompt_ids = encoder.prompt(row.prompt, row.tools)
        limit.check(len(prompt_ids))
        return Request(row.prompt, tuple(prompt_ids), seed=0, columns=row.columns)

    return parse


def _limit(key: str, tokens: int, positions: int | None, room: str = "the model's context length") -> Limit:
    """The smaller one of a setting and of what the model has room for."""
    if positions is not None and positions < tokens:
        return Limit(positions, room)
    return Limit(tokens, key, key)
