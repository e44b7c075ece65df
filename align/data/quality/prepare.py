"""Cleans rows by steps, splits them by prompt, puts prompts into templates, and writes files of JSON lines."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from align.data.datasets import split_heldout
from align.data.quality.corpus import Corpus
from align.data.quality.rows import CheckedRow, compared_text
from align.data.quality.steps import CleaningStep, StepCount, make_steps
from align.data.quality.templates import rendered
from align.data.quality.words import normalised
from align.runtime.atomic_files import new_file
from align.runtime.seeds import seed_for
from align.runtime.wording import counted
from policies.errors import UserError
from policies.text.columns import SURROGATE


@dataclass(frozen=True)
class Prepared:
    """What has been done to the rows.

    Attributes:
        read: How many rows were read.
        steps: What each step has done.
        files: The rows of each file to write.
    """

    read: int
    steps: Sequence[StepCount]
    files: Mapping[Path, Sequence[Mapping[str, Any]]]


def heldout_path(to: Path) -> Path:
    """The file of the held-out rows beside that of the others: `rows-heldout.jsonl` beside `rows.jsonl`."""
    return to.with_name(f"{to.stem}-heldout{to.suffix}")


def prepare(
    corpus: Corpus,
    steps: Sequence[CleaningStep],
    to: Path,
    *,
    heldout_share: float | None,
    templates: Sequence[str],
    seed: int,
) -> Prepared:
    """Clean, split and render the rows.

    Args:
        corpus: The rows.
        steps: Made in order.
        to: The file to write.
        heldout_share: Approximate share of the prompts whose rows go to `heldout_path(to)`; None: no split.
        templates: Each prompt is put into one of them; none: prompts stay as they are.
        seed: Of the split and of the choice of templates.

    Raises:
        UserError: No row is left, one cannot be read or rendered, or the prompts cannot be split.
    """
    read = len(corpus.rows)
    corpus, counts = make_steps(corpus, steps)
    _check(corpus)
    sides = {to: corpus.rows}
    if heldout_share is not None:
        # Before prompts are rendered: one prompt in two templates must not be on both sides.
        kept, heldout = _split(corpus.rows, heldout_share, seed)
        sides = {to: kept, heldout_path(to): heldout}
    numbers = {id(row): number for number, row in enumerate(corpus.rows)}
    files: dict[Path, Sequence[Mapping[str, Any]]] = {}
    for path, rows in sides.items():
        files[path] = [_written(row, templates, seed, numbers[id(row)]) for row in rows]
    return Prepared(read, counts, files)


def _check(corpus: Corpus) -> None:
    """Refuse to write what a run cannot read, or nothing."""
    if not corpus.rows:
        raise UserError("no row is left after these steps: nothing is written")
    unreadable = [row for row in corpus.rows if row.content is None]
    if unreadable:
        first = unreadable[0]
        raise UserError(
            f"{counted(len(unreadable), 'row')} cannot be read, such as {first.where}: {first.problem}; "
            "add drop-unreadable to --steps"
        )


def _split(rows: Sequence[CheckedRow], share: float, seed: int) -> tuple[list[CheckedRow], list[CheckedRow]]:
    try:
        return split_heldout(rows, share, seed_for(seed, "split", "prepare"), _split_key_of_row)
    except ValueError as error:
        raise UserError(f"--heldout-share: {error}") from None


def _split_key_of_row(row: CheckedRow) -> str:
    assert row.content is not None  # others have been refused
    return normalised(compared_text(row.content))


def _written(row: CheckedRow, templates: Sequence[str], seed: int, number: int) -> Mapping[str, Any]:
    return rendered(row, templates, seed, number) if templates else row.values


def write_prepared(prepared: Prepared) -> None:
    """Write each file completely or not at all."""
    with ExitStack() as stack:
        for path, rows in prepared.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(new_file(path))
            for values in rows:
                file.write(_line(values).encode())


def _line(values: Mapping[str, Any]) -> str:
    """A row as a line of JSON. Dates, which Parquet has, become text; half surrogate pairs stay escaped."""
    line = json.dumps(values, ensure_ascii=False, default=str)
    if SURROGATE.search(line):
        line = json.dumps(values, default=str)
    return f"{line}\n"


def prepared_record(prepared: Prepared) -> dict[str, Any]:
    """What has been done as a JSON object."""
    written = [{"file": str(path), "rows": len(rows)} for path, rows in prepared.files.items()]
    return {"rows": prepared.read, "steps": list(map(asdict, prepared.steps)), "written": written}


def prepared_table(prepared: Prepared) -> Table:
    """What has been done as a table for the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("step")
    for name in ("removed", "changed", "rows"):
        table.add_column(name, justify="right")
    table.add_row("read", "", "", f"{prepared.read:,}")
    for step in prepared.steps:
        table.add_row(step.name, f"{step.removed:,}", f"{step.changed:,}", f"{step.rows:,}")
    for path, rows in prepared.files.items():
        table.add_row(f"written to {path}", "", "", f"{len(rows):,}")
    return table
