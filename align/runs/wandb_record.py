"""What W&B's files on this machine say that a W&B run has."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.stage import all_stages
from align.runs.logged_figures import LoggedFigures
from align.runs.sink import PROBE_TABLE, SAMPLE_TABLE
from policies.errors import UserError


@dataclass
class Recorded:
    """What a W&B run has.

    Attributes:
        figures: Its metrics, tables and images.
        growths: How often each of its growing tables has grown.
        kept: The names and versions of its artifacts.
    """

    figures: LoggedFigures = field(default_factory=LoggedFigures)
    growths: Counter[str] = field(default_factory=Counter)
    kept: set[tuple[str, str]] = field(default_factory=set)


def read_recorded(run: Path, name: str, summary: Mapping[str, Any]) -> Recorded:
    """Find out what a W&B run has: what is in its files, and what only the server has.

    Args:
        run: The folder of align's run.
        name: The id of the W&B run.
        summary: The last value of each metric; online, the server's.

    Raises:
        UserError: A file cannot be read.
    """
    recorded = Recorded()
    for file in sorted((run / "wandb").glob(f"*run-*-{name}/*.wandb")):
        for record in _records(file):
            if record["type"] == "history":
                _add_figures(recorded, record["history"]["item"])
            elif record["type"] == "artifact":
                artifact = record["artifact"]
                recorded.kept.update((artifact["name"], alias) for alias in artifact.get("aliases", []))
    for stage in all_stages():
        # W&B writes its file every 15 s, and may have sent more when it was killed.
        if summary.get(stage.axis, -1) > recorded.figures.last_step(stage.name):
            recorded.figures.add(stage.name, summary[stage.axis], summary.keys())
    return recorded


def _add_figures(recorded: Recorded, item: Mapping[str, Any]) -> None:
    """Add what one `log` of W&B has logged. Tables and images have several entries, `NAME._type` among them."""
    names = [name.removesuffix("._type") for name in item]
    recorded.growths.update(table for table in (SAMPLE_TABLE, PROBE_TABLE) if table in names)
    for stage in all_stages():
        if stage.axis in item:
            recorded.figures.add(stage.name, item[stage.axis], names)


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of one of W&B's files, which may end anywhere."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    if read.returncode:
        raise UserError(f"{file} cannot be read: {read.stderr.strip()}. Remove its folder to continue without it")
    for line in read.stdout.splitlines():
        yield json.loads(line)
