"""Soft prompts of several tasks in one file."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from policies.errors import UserError
from policies.files.safe_reading import read_tensors

MARK = "#"
"""FILE#TASK names one task's tokens in a table."""


def read_task(where: str) -> Tensor:
    """The virtual tokens of FILE#TASK. Raises UserError where file or task is not there."""
    file, _, task = where.rpartition(MARK)
    tokens = _read(Path(file))
    if task not in tokens:
        raise UserError(f"prompt table {file} has no task {task!r}: it has {', '.join(sorted(tokens))}")
    return tokens[task]


def add_task(path: Path, task: str, tokens: Tensor, facts: Mapping[str, str]) -> None:
    """Put a task's virtual tokens into a table, a new one or one that is there; the other tasks stay bit for bit.

    facts: what all tasks of a table have in common, their base and their method. Raises UserError where the table's
    are others, or where it has the task already.
    """
    held: dict[str, Tensor] = {}
    if path.exists():
        held, theirs = _read(path), _facts(path)
        if odd := [name for name, value in facts.items() if theirs.get(name) != value]:
            raise UserError(
                f"prompt table {path} is for {odd[0]} {theirs.get(odd[0])}, and this prompt for {facts[odd[0]]}: "
                "give another file"
            )
        if task in held:
            raise UserError(f"prompt table {path} has a task {task!r} already: give another name")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(held | {task: tokens.detach().cpu().contiguous()}, partial, metadata=dict(facts))
    os.replace(partial, path)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except UserError as error:
        raise UserError(f"prompt table {error}") from error


def _facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
