"""What a plant is: a fault put into a clean file on purpose, and what the check should say of it."""

import copy
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.align.data.quality.clean_files import Row, clean_rows

SEED = 11
MAIN = "rows.jsonl"
SECOND = "more.jsonl"
HELDOUT = "heldout.jsonl"


@dataclass
class Files:
    """The files of one command. A row that is text is written as the line that it is.

    Attributes:
        rows: Of the file that is checked, clean at first.
        second: Of a second file; none where empty.
        heldout: Of the file of held-out prompts; none where empty.
        rng: Chooses the rows that become faulty.
    """

    rows: list[Any]
    second: list[Any] = field(default_factory=list)
    heldout: list[Row] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))

    def some(self, count: int, choose: Callable[[Row], bool] = lambda row: True) -> list[int]:
        """Indices of some of the rows that may be chosen, ascending."""
        candidates = [i for i, row in enumerate(self.rows) if choose(row)]
        return sorted(self.rng.sample(candidates, count))

    def copy_of(self, index: int, **changes: Any) -> Row:
        """A copy of a row under an id of its own."""
        return copy.deepcopy(self.rows[index]) | {"id": f"copy-{index}"} | changes


Locations = Iterable[int | str]
"""The faulty rows: the index of one in the main file, or a location in another."""
PlantFault = Callable[[Files], Locations | None]
"""Plants a fault and returns where; None where it is in the file as a whole."""


@dataclass(frozen=True)
class Plant:
    """A fault, and what the check should say of it.

    Attributes:
        kind: The finding that is expected.
        fault: Plants it.
        form: Of the clean rows.
        options: Further ones of the command.
        template: The chat template of `--model`; without one, no model is given.
        also: Other problems that the plant is too.
        among: Whether other rows may be located besides the planted ones.
    """

    kind: str
    fault: PlantFault
    form: str
    options: tuple[str, ...] = ()
    template: str | None = None
    also: frozenset[str] = frozenset()
    among: bool = False

    @property
    def name(self) -> str:
        """For the names of tests."""
        return f"{self.kind}: {self.fault.__name__.replace('_', ' ')}"

    def write(self, folder: Path) -> tuple[list[str], set[str] | None]:
        """Write the files. Returns the arguments that name them, and the locations of the faults."""
        files = Files(clean_rows(self.form, SEED))
        planted = self.fault(files)
        arguments = [MAIN]
        write_rows(folder / MAIN, files.rows)
        if files.second:
            write_rows(folder / SECOND, files.second)
            arguments.append(SECOND)
        if files.heldout:
            write_rows(folder / HELDOUT, files.heldout)
            arguments += ["--heldout", HELDOUT]
        if planted is None:
            return arguments, None
        return arguments, {f"{MAIN}:{item + 1}" if isinstance(item, int) else item for item in planted}


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
