"""Parses rows: good ones become demonstrations, prompts or preference examples, bad ones are reported."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from align.data.source_row import SourceRow
from policies.errors import UserError
from policies.text import columns
from policies.text.encoder import ASSISTANT, Tools
from policies.text.tokenization import Message, Prompt

T = TypeVar("T")

MAX_REPORTED = 5
"""How many invalid rows an error message lists: more would hide the hint at its end."""


class RowTooLong(ValueError):
    """A row has more tokens than a limit.

    Attributes:
        key: The setting that can raise the limit; None where the model is the limit.
        tokens: How many the row has.
    """

    def __init__(self, message: str, key: str | None, tokens: int) -> None:
        super().__init__(message)
        self.key = key
        self.tokens = tokens


@dataclass(frozen=True)
class Demonstration:
    """A prompt with the desired response, and the functions that the assistant may call."""

    prompt: Prompt
    completion: str
    tools: Tools | None = None


@dataclass(frozen=True)
class Transcript:
    """A conversation whose last message is the assistant's, and the functions that the assistant may call."""

    messages: list[Message]
    tools: Tools | None = None


@dataclass(frozen=True)
class PromptRow:
    """A prompt, and the other columns of its row, for functions that score responses."""

    prompt: Prompt
    columns: dict[str, Any]
    tools: Tools | None = None


@dataclass(frozen=True)
class ParsedRows(Generic[T]):
    """The items of the good rows, and the location and problem of each bad one."""

    items: list[T]
    skipped: list[str]


def parse_rows(
    rows: Iterable[SourceRow],
    parse: Callable[[Mapping[str, Any]], T],
    on_bad_row: Literal["error", "skip"],
    can_skip: bool = True,
) -> ParsedRows[T]:
    """Parse each row.

    Args:
        rows: The rows that `read_rows` returned.
        parse: Turns a row's columns into an item; raises ValueError, with the reason, for an invalid row.
        on_bad_row: Whether invalid rows are an error or are skipped.
        can_skip: Whether the error may advise to skip them.

    Raises:
        UserError: There are invalid rows and they are an error, or there is no valid row.
    """
    items: list[T] = []
    skipped: list[str] = []
    longest: dict[str, int] = {}
    for row in rows:
        try:
            if row.problem:
                raise ValueError(row.problem)
            items.append(parse(row.values))
        except ValueError as error:
            skipped.append(f"{row.where}: {error}")
            if isinstance(error, RowTooLong) and error.key:
                longest[error.key] = max(error.tokens, longest.get(error.key, 0))
    if skipped and (on_bad_row == "error" or not items):
        raise UserError(_bad_rows_message(skipped, longest, some_are_good=bool(items), can_skip=can_skip))
    return ParsedRows(items, skipped)


def _bad_rows_message(bad_rows: list[str], longest: Mapping[str, int], some_are_good: bool, can_skip: bool) -> str:
    lines = bad_rows[:MAX_REPORTED]
    further = len(bad_rows) - len(lines)
    if further:
        lines.append(f"… and {further} more invalid row{'s' if further > 1 else ''}")
    lines += [f"{key}={tokens} keeps every row that is too long" for key, tokens in longest.items()]
    if not some_are_good:
        lines.append("there is no good row")
    elif can_skip:
        lines.append("data.on_bad_row=skip skips them")
    return "\n".join(lines)


def parse_demonstration(values: Mapping[str, Any]) -> Demonstration | Transcript:
    """Parse a row with `prompt` and `completion`; with `messages`, the last by the assistant; or with `text` alone.

    A row with messages may have `tools`.
    """
    if columns.has(values, "messages"):
        messages = columns.messages(values["messages"], "messages")
        if len(messages) < 2:
            raise ValueError("`messages` has one message; a prompt and a reply by the assistant were expected")
        role = messages[-1]["role"]
        if role != ASSISTANT:
            raise ValueError(f"the last of `messages` is by {columns.shown(role)}; one by the assistant was expected")
        return Transcript(messages, columns.tools(values, messages))
    if columns.has(values, "text") and not columns.has(values, "completion"):
        return Demonstration("", columns.text(values, "text"))
    prompt = columns.prompt(values)
    completion = columns.present(values, "completion")
    return Demonstration(prompt, columns.reply(completion, "completion"), columns.tools(values, prompt))


def parse_prompt(values: Mapping[str, Any]) -> PromptRow:
    """Parse a row with `prompt`; all other columns pass through. A row with messages may have `tools`."""
    other_columns = {name: value for name, value in values.items() if name != "prompt"}
    prompt = columns.prompt(values)
    tools = None if isinstance(prompt, str) else columns.tools(values, prompt)
    return PromptRow(prompt, other_columns, tools)
