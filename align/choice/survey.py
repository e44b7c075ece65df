"""Looks at data files, the base model and the machine: the facts that rules ask about."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import psutil

from align.choice.facts import RowKind
from align.config.schema import SourceSettings
from align.data.forms import form_of_row
from align.data.readers import read_rows
from align.data.source_row import SourceRow
from align.runtime.wording import byte_count
from policies.device import gpu_memory
from policies.errors import UserError
from policies.files.base_model import load_tokenizer
from policies.text.columns import Values, has
from rewards.terms.number import ANSWER_MARKS, NUMBER, final_number

SURVEYED_ROWS = 1000
"""How many rows of a file decide of which kind it is, and how many texts are tokenized to estimate their tokens."""
ANSWER = "answer"
"""The column that a check compares a response with."""


@dataclass
class Survey:
    """What the data files hold.

    Attributes:
        rows: Number of rows of each kind.
        sources: The files of each kind, as `path` and `columns` of a source.
        labels: The labels, as text.
        is_regression: Whether a label is a number with a decimal point.
        texts: The plain texts.
        numeric_answers: Whether all answers are numbers.
    """

    rows: Counter[RowKind] = field(default_factory=Counter)
    sources: dict[RowKind, SourceSettings] = field(default_factory=dict)
    labels: set[str] = field(default_factory=set)
    is_regression: bool = False
    texts: list[str] = field(default_factory=list)
    numeric_answers: bool = True

    @property
    def classes(self) -> int:
        """Number of classes; 0 where labels are numbers with a decimal point, or there are none."""
        return 0 if self.is_regression else len(self.labels)

    @property
    def answer_term(self) -> dict[str, str]:
        """The reward term that compares responses with the answers."""
        return {"kind": "number" if self.numeric_answers else "exact"}

    def text_tokens(self, model: str) -> int:
        """Tokens of the plain texts, from those of the first by the model's tokenizer."""
        if not self.texts:
            return 0
        tokenizer = load_tokenizer(model)
        sample = self.texts[:SURVEYED_ROWS]
        tokens = sum(len(ids) for ids in tokenizer(sample)["input_ids"])
        characters = sum(map(len, sample))
        return round(sum(map(len, self.texts)) * tokens / max(1, characters))


def survey_data(files: Sequence[Path], columns: dict[str, str]) -> Survey:
    """Read files, and recognise by their columns what they hold.

    Args:
        files: Files, or folders of files.
        columns: align's name of a column: its name in the data; each file is renamed by those that it has.

    Raises:
        UserError: A file cannot be read, or it is not recognised what its rows are.
    """
    survey = Survey()
    for path in files:
        _add_file(survey, path, columns)
    return survey


def _add_file(survey: Survey, path: Path, columns: dict[str, str]) -> None:
    plain = read_rows(SourceSettings(path=str(path)))
    names = set().union(*(row.values for row in plain))
    own = {new_name: name for new_name, name in columns.items() if name in names}
    rows = read_rows(SourceSettings(path=str(path), columns=own)) if own else plain
    kind = _kind_of_file(path, rows)
    survey.rows[kind] += len(rows)
    survey.sources[kind] = _with_file(survey.sources.get(kind), path, own)
    for row in rows:
        _note(survey, kind, row.values)


def _with_file(source: SourceSettings | None, path: Path, columns: dict[str, str]) -> SourceSettings:
    """A source with one more file. Raises UserError where its files would need different columns."""
    if source is None:
        return SourceSettings(path=str(path), columns=columns)
    if source.columns != columns:
        raise UserError(f"{path} and {source.path} hold the same kind of rows under different columns: use one name")
    earlier = [source.path] if isinstance(source.path, str) else source.path
    return SourceSettings(path=[*earlier, str(path)], columns=columns)


def _note(survey: Survey, kind: RowKind, values: Values) -> None:
    """Note what a row says about its kind."""
    if kind == "labels":
        survey.labels.add(str(values.get("label")))
        survey.is_regression |= isinstance(values.get("label"), float)
    elif kind == "texts":
        survey.texts.append(str(values.get("text", "")))
    elif kind == "answers":
        survey.numeric_answers &= _is_number(str(values.get(ANSWER, "")))


def _is_number(answer: str) -> bool:
    """Whether an answer is a number, or marks the number that it concludes with."""
    is_marked = any(mark.search(answer) for mark in ANSWER_MARKS)
    return final_number(answer) is not None and (is_marked or NUMBER.fullmatch(answer.strip()) is not None)


def _kind_of_file(path: Path, rows: Sequence[SourceRow]) -> RowKind:
    counts: Counter[RowKind] = Counter()
    for row in rows[:SURVEYED_ROWS]:
        if kind := kind_of_row(row.values):
            counts[kind] += 1
    if not counts:
        listed = chain.from_iterable(row.values for row in rows[:SURVEYED_ROWS])
        names = ", ".join(dict.fromkeys(listed)) or "none"
        raise UserError(
            f"{path}: it is not recognised what the rows are; columns: {names}. --column prompt=NAME renames one"
        )
    if counts.keys() == {"verdicts", "ratings"}:
        return "ratings"
    return counts.most_common(1)[0][0]


def kind_of_row(values: Values) -> RowKind | None:
    """The kind of a row, by its columns and, of ratings, by their values; None where it is of none."""
    has_text = has(values, "text") or has(values, "prompt")
    if has(values, "label") and has_text and not has(values, "completion"):
        return "labels"
    if form := form_of_row(values, "preferences"):
        if form.name != "rating":
            return "preferences"
        return "verdicts" if values["rating"] in (0, 1) else "ratings"
    if form := form_of_row(values, "demonstrations"):
        return "texts" if form.name == "text" else "demonstrations"
    if form_of_row(values, "prompts"):
        return "answers" if has(values, ANSWER) else "prompts"
    return None


@dataclass(frozen=True)
class Machine:
    """The memory that each process can compute in.

    Attributes:
        bytes: The memory of its GPU or, without one, of the machine.
        has_gpu: Whether it is that of a GPU.
    """

    bytes: float
    has_gpu: bool

    @property
    def gpu_bytes(self) -> float | None:
        """Memory of the GPU of each process; None: processes compute on CPUs."""
        return self.bytes if self.has_gpu else None

    def __str__(self) -> str:
        return f"{byte_count(self.bytes)} of memory, {'of each GPU' if self.has_gpu else 'without a GPU'}"


def find_machine(gpu_gigabytes: float | None) -> Machine:
    """The machine. gpu_gigabytes: memory of the GPU of each process in GB; None: that of this machine's, if any."""
    gpu_bytes = gpu_memory() if gpu_gigabytes is None else gpu_gigabytes * 1e9
    if gpu_bytes:
        return Machine(gpu_bytes, has_gpu=True)
    return Machine(psutil.virtual_memory().total, has_gpu=False)
