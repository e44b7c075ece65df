"""All rows that one command checks, and what several checks need to know of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from align.config.schema import SourceSettings
from align.data.forms import CHECKED_KINDS, FORMS, DataKind, Form, form_of_row
from align.data.quality.rows import CheckedRow, Content, check_row, compared_text
from align.data.quality.words import count_words
from align.data.readers import read_rows
from align.data.source_row import SourceRow
from policies.errors import UserError
from policies.text.columns import has
from policies.text.encoder import TextEncoder
from policies.text.tokenization import prompt_text

RECOGNISED_BY = 1000
"""How many rows of a file decide what it is."""


@dataclass(frozen=True, slots=True)
class RowLength:
    """How long the parts of a row are, in tokens or words."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def row(self) -> int:
        """The prompt with the longest response."""
        return self.prompt + max(self.responses, default=0)


@dataclass
class Corpus:
    """The rows of all files.

    Attributes:
        kind: What they are.
        files: The names of the files.
        rows: In order.
        encoder: Of the model's tokenizer; None: lengths are in words.
        max_length: The most tokens, or words, of a row; None: unlimited.
        heldout: Prompts that must not be among the rows, or texts without a prompt; None: no such file was given.
        heldout_files: The names of the files that they are from.
        template_problems: Why the chat template does not render a row, by its index, once `lengths` has been read.
    """

    kind: DataKind
    files: Sequence[str]
    rows: Sequence[CheckedRow]
    encoder: TextEncoder | None = None
    max_length: int | None = None
    heldout: Sequence[str] | None = None
    heldout_files: Sequence[str] = ()
    template_problems: dict[int, str] = field(default_factory=dict)

    def with_rows(self, rows: Sequence[CheckedRow]) -> "Corpus":
        """The same with other rows."""
        return replace(self, rows=rows, template_problems={})

    @property
    def unit(self) -> str:
        """The unit of lengths."""
        return "tokens" if self.encoder else "words"

    @cached_property
    def contents(self) -> dict[int, Content]:
        """What each row says, by its index, without the rows that cannot be read."""
        return {index: row.content for index, row in enumerate(self.rows) if row.content is not None}

    @cached_property
    def lengths(self) -> dict[int, RowLength]:
        """The lengths of the rows that can be read; with a model, of those that its chat template renders."""
        if self.encoder is None:
            return {index: _word_length(content) for index, content in self.contents.items()}
        lengths: dict[int, RowLength] = {}
        for index, content in self.contents.items():
            try:
                lengths[index] = _token_length(self.encoder, content)
            except ValueError as error:
                self.template_problems[index] = str(error)
        return lengths

    @cached_property
    def required(self) -> list[set[str]]:
        """For each file, the columns beside those of a form that most of its rows fill."""
        rows = Counter(row.file for row in self.rows)
        with_prompt = Counter(row.file for row in self.rows if has(row.columns, "prompt"))
        return [{"prompt"} if 2 * with_prompt[file] > rows[file] else set() for file in range(len(self.files))]


def read_corpus(
    paths: Sequence[Path],
    kind: DataKind | None = None,
    columns: dict[str, str] | None = None,
) -> Corpus:
    """Read files to check.

    Args:
        paths: The files, or folders of files.
        kind: What they are; None: recognised by their columns.
        columns: align's name of a column: its name in the data.

    Raises:
        UserError: A file cannot be read, or it is not recognised what the files are.
    """
    sources = [read_rows(SourceSettings(path=str(path), columns=columns or {})) for path in paths]
    kind = kind or _recognised(paths, sources)
    rows: list[CheckedRow] = []
    for file, source in enumerate(sources):
        usual = _usual_form(source, kind)
        rows += [check_row(row, file, kind, usual) for row in source]
    return Corpus(kind, [str(path) for path in paths], rows)


def heldout_texts(paths: Sequence[Path], columns: dict[str, str]) -> list[str]:
    """The prompts of held-out files of any kind; texts without a prompt as they are. Columns that no row has stay."""
    texts: list[str] = []
    for path in paths:
        names = _columns_of(path)
        renamed = {new_name: name for new_name, name in columns.items() if name in names}
        texts += [compared_text(content) for content in read_corpus([path], columns=renamed).contents.values()]
    return texts


def _columns_of(path: Path) -> set[str]:
    names: set[str] = set()
    for row in read_rows(SourceSettings(path=str(path))):
        names.update(row.values)
    return names


def _recognised(paths: Sequence[Path], sources: Sequence[Sequence[SourceRow]]) -> DataKind:
    """What the files are: preferences, else demonstrations, else prompts."""
    found = [_kind_of_file(rows) for rows in sources]
    for path, rows, kind in zip(paths, sources, found, strict=True):
        if kind is None:
            listed = chain.from_iterable(row.values for row in rows[:RECOGNISED_BY])
            names = ", ".join(dict.fromkeys(listed)) or "none"
            raise UserError(
                f"{path}: it is not recognised what the rows are; columns: {names}. --column prompt=NAME renames one, "
                f"and --kind is one of {', '.join(CHECKED_KINDS)}"
            )
    if len(set(found)) > 1:
        each = ", ".join(f"{path} has {kind}" for path, kind in zip(paths, found, strict=True))
        raise UserError(f"the files are of several kinds: {each}; check each by itself, or set --kind")
    return next(kind for kind in found if kind is not None)


def _kind_of_file(rows: Sequence[SourceRow]) -> DataKind | None:
    counts: Counter[DataKind] = Counter()
    for row in rows[:RECOGNISED_BY]:
        for kind in ("preferences", "demonstrations", "prompts"):
            if form_of_row(row.values, kind):
                counts[kind] += 1
                break
    return counts.most_common(1)[0][0] if counts else None


def _usual_form(rows: Sequence[SourceRow], kind: DataKind) -> Form | None:
    counts: Counter[str] = Counter()
    for row in rows:
        form = form_of_row(row.values, kind)
        if form:
            counts[form.name] += 1
    name = counts.most_common(1)[0][0] if counts else None
    return next((form for form in FORMS if form.kind == kind and form.name == name), None)


def _word_length(content: Content) -> RowLength:
    responses = tuple(map(count_words, content.responses))
    return RowLength(count_words(prompt_text(content.prompt)), responses)


def _token_length(encoder: TextEncoder, content: Content) -> RowLength:
    """Raises ValueError where the chat template fails."""
    if content.messages is not None:
        conversation = encoder.conversation(content.messages, "last", content.tools)
        start, end = conversation.turns[0]
        return RowLength(start, (end - start,))
    if not content.responses:
        return RowLength(len(encoder.prompt(content.prompt, content.tools)), ())
    exchanges = [encoder.exchange(content.prompt, response, content.tools) for response in content.responses]
    responses = tuple(len(exchange.response_ids) for exchange in exchanges)
    return RowLength(len(exchanges[0].prompt_ids), responses)
