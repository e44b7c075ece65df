"""Prompt tables: soft prompts of several tasks in one safetensors file."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from policies.errors import UserError
from policies.files.safe_reading import read_tensors
from policies.files.writing import save_tensors

MARK = "#"
"""FILE#TASK names one task's tokens in a table."""


def read_task(where: str) -> Tensor:
    """The virtual tokens of FILE#TASK, `[virtual_tokens, width]`. Raises UserError where file or task is missing."""
    file, _, task = where.rpartition(MARK)
    tokens = read_table(Path(file))
    if task not in tokens:
        raise UserError(f"prompt table {file} has no task {task!r}: it has {', '.join(sorted(tokens))}")
    return tokens[task]


def read_table(path: Path) -> dict[str, Tensor]:
    """The virtual tokens `[virtual_tokens, width]` of all tasks of a table, by the task's name.

    Raises:
        UserError: The file does not exist or is damaged.
    """
    try:
        return read_tensors(path)
    except UserError as error:
        raise UserError(f"prompt table {error}") from error


def add_task(path: Path, task: str, tokens: Tensor, metadata: Mapping[str, str]) -> None:
    """Add a task's virtual tokens to a new or existing table; the other tasks stay the same bit for bit.

    Args:
        path: The table, a safetensors file.
        task: The task's name in the table.
        tokens: `[virtual_tokens, width]`.
        metadata: What all tasks of a table have in common: the base model, and the kind of virtual tokens.

    Raises:
        UserError: The table's metadata differs, or it has the task already.
    """
    tasks: dict[str, Tensor] = {}
    if path.exists():
        tasks = read_table(path)
        _check_metadata(path, metadata)
        if task in tasks:
            raise UserError(f"prompt table {path} has a task {task!r} already: give another name")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_tensors(tasks | {task: tokens.detach().cpu().contiguous()}, partial, metadata=metadata)
    os.replace(partial, path)


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise UserError where a table's metadata is not that of the prompt to be added."""
    with safe_open(path, "pt") as file:
        saved = dict(file.metadata() or {})
    for name, value in metadata.items():
        if saved.get(name) != value:
            raise UserError(
                f"prompt table {path} is for {name} {saved.get(name)}, but this prompt for {value}: give another file"
            )
