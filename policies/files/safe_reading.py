"""Reads files from a run, a user or a download without ever running code in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from policies.errors import UserError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`: without it transformers asks at the terminal whether to run code in a model's folder."""
SAFE: dict[str, Any] = NO_CODE | {"use_safetensors": True}
"""For every `from_pretrained` of a model: its weights may be pickles, which run code when they are read."""


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError where the file is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, it cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError as `read_json` does, and where the value is not an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name. Raises UserError where the file is missing or cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, it cannot be read: {error}") from error


def check_names_and_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path | str) -> None:
    """Check that tensors have the names and shapes of those that they will replace.

    Args:
        tensors: The tensors that were read, by name.
        expected: The model's tensors, by name.
        path: Where the tensors were read from, for messages.

    Raises:
        UserError: Names or shapes differ.
    """
    different = sorted(tensors.keys() ^ expected.keys())
    if different:
        where = "in" if different[0] in tensors else "missing from"
        raise UserError(f"{path} does not fit this model: {different[0]} is {where} it")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path} does not fit this model: the shape of {name} is {list(tensor.shape)}, but "
                f"{list(expected[name].shape)} in the model"
            )
