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
    """The virtual tokens of FILE#TASK, `[virtual_tokens, width]`. Raises UserError where either is missing."""
    file, _, task = where.rpartition(MARK)
    tokens = _read(Path(file))
    if task not in tokens:
        raise UserError(f"prompt table {file} has no task {task!r}: it has {', '.join(sorted(tokens))}")
    return tokens[task]


def add_task(path: Path, task: str, tokens: Tensor, metadata: Mapping[str, str]) -> None:
    """Put a task's virtual tokens into a table, a new or an existing one; the other tasks stay bit for bit.

    Args:
        path: of the table, a safetensors file.
        task: its name.
        tokens: `[virtual_tokens, width]`.
        metadata: what all tasks of a table have in common: their base, and what their virtual tokens are.

    Raises:
        UserError: the table's metadata differs, or it has the task already.
    """
    tasks: dict[str, Tensor] = {}
    if path.exists():
        tasks = _read(path)
        _check_metadata(path, metadata)
        if task in tasks:
            raise UserError(f"prompt table {path} has a task {task!r} already: give another name")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tasks | {task: tokens.detach().cpu().contiguous()}, partial, metadata=dict(metadata))
    os.replace(partial, path)


def _check_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Raise UserError where a table's metadata is not that of the prompt that it should take."""
    with safe_open(path, "pt") as file:
        of_table = dict(file.metadata() or {})
    for name, value in metadata.items():
        if of_table.get(name) != value:
            raise UserError(
                f"prompt table {path} is for {name} {of_table.get(name)}, but this prompt for {value}: "
                "give another file"
            )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except UserError as error:
        raise UserError(f"prompt table {error}") from error
