"""A row as the checks see it: what it says where it can be read, and its texts where it cannot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.forms import DataKind, Form, form_of_row, in_align_columns
from align.data.parsing import Transcript, parse_demonstration, parse_prompt
from align.data.quality.transcripts import SPEAKER
from align.data.source_row import SourceRow
from policies.text.columns import Values
from policies.text.encoder import Tools
from policies.text.tokenization import Message, Prompt
from rewards.preferences import OVERALL, Preference, parse_preference

TEXT_COLUMNS = (
    "prompt",
    "completion",
    "messages",
    "text",
    "chosen",
    "rejected",
    "responses",
    "response",
    "instruction",
    "input",
    "output",
    "conversations",
    "completions",
    "system",
)
"""The columns of all forms that contain text, messages, or lists of these."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a row says.

    Attributes:
        prompt: Text or messages; empty for plain text without a prompt.
        responses: Best first, where one is better than another; none for a prompt.
        preference: Between the responses, or about the one.
        attribute: What the responses were compared by.
        tools: The functions that the assistant may call.
        messages: The conversation that prompt and response are from; None where they are apart in the row.
    """

    prompt: Prompt
    responses: tuple[str, ...] = ()
    preference: Preference | None = None
    attribute: str = OVERALL
    tools: Tools | None = None
    messages: list[Message] | None = None


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row of a file that is checked.

    Attributes:
        where: Its location.
        file: The index of its file.
        form: Its form or, where it has none, that of most rows of its file.
        columns: Its columns as they are in the file, renamed.
        values: Its columns in align's form; as in the file where they cannot be converted.
        text_columns: The columns of `values` that contain its texts.
        content: What it says; None where it cannot be read.
        problem: Why it cannot be read.
    """

    where: str
    file: int
    form: Form | None
    columns: Values
    values: Values
    text_columns: tuple[str, ...]
    content: Content | None
    problem: str | None

    def texts(self) -> Iterator[tuple[str, str]]:
        """Each text with the name of its column."""
        for name in self.text_columns:
            for text in texts_in(self.values[name]):
                yield name, text


def check_row(row: SourceRow, file: int, kind: DataKind, usual: Form | None) -> CheckedRow:
    """Read a row.

    Args:
        row: With the columns of any form.
        file: The index of its file.
        kind: What it is.
        usual: The form of most rows of its file.
    """
    form = form_of_row(row.values, kind)
    aligned = in_align_columns(row, kind, form)[0]
    content: Content | None = None
    problem = aligned.problem
    if problem is None:
        try:
            content = _content(aligned.values, kind)
        except ValueError as error:
            problem = str(error)
    values = row.values if aligned.problem else aligned.values
    return CheckedRow(
        where=row.where,
        file=file,
        form=form or usual,
        columns=row.values,
        values=values,
        text_columns=_text_columns(values, kind, is_read=content is not None),
        content=content,
        problem=problem,
    )


def _text_columns(values: Values, kind: DataKind, is_read: bool) -> tuple[str, ...]:
    """The columns with text: those of the row's form or, of a row that cannot be read, of all forms."""
    names: tuple[str, ...] = TEXT_COLUMNS
    if is_read:
        form = form_of_row(values, kind)
        names = ("prompt", *(form.columns if form and form.columns != ("prompt",) else ()))
    return tuple(name for name in names if name in values and name in TEXT_COLUMNS)


def _content(values: Values, kind: DataKind) -> Content:
    """What a row says. Raises ValueError with the reason for a row that a run would refuse."""
    if kind == "prompts":
        asked = parse_prompt(values)
        return Content(asked.prompt, tools=asked.tools)
    if kind == "preferences":
        example = parse_preference(values)
        return Content(example.prompt, example.responses, example.preference, example.attribute)
    demonstration = parse_demonstration(values)
    if isinstance(demonstration, Transcript):
        *before, last = demonstration.messages
        return Content(before, (last["content"],), tools=demonstration.tools, messages=demonstration.messages)
    return Content(demonstration.prompt, (demonstration.completion,), tools=demonstration.tools)


def texts_in(value: Any) -> Iterator[str]:
    """The texts of a column: itself, or those of messages, responses and completions."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in ("content", "value", "response"):
            if isinstance(value.get(key), str):
                yield value[key]
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def spoken(prompt: Prompt) -> str:
    """A prompt as one text, without the speakers, nor the system's messages, which are often the same in all rows."""
    if isinstance(prompt, str):
        return SPEAKER.sub("\n", prompt) if prompt.startswith("\n\nHuman:") else prompt
    return "\n".join(message["content"] for message in prompt if message["role"] not in ("system", "developer"))


def compared_text(content: Content) -> str:
    """What must not be on both sides of a split: the prompt or, for plain text without a prompt, the text."""
    return spoken(content.prompt) or (content.responses[0] if content.responses else "")
