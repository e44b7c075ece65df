"""Files that a run, a user or a download has left, read such that nothing in them is ever run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from policies.errors import UserError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""For every `from_pretrained`: unset, transformers asks at the terminal whether to run the code in a model's folder."""
SAFE: dict[str, Any] = NO_CODE | {"use_safetensors": True}
"""For every `from_pretrained` of a model: its weights may be pickles, which run what they hold when they are read."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises UserError where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, it cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file with an object holds. Raises UserError as `read_json` does, and where it holds another thing."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds. Raises UserError where there is none or it cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, it cannot be read: {error}") from error


def check_names_and_shapes(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path | str) -> None:
    """Raise UserError where tensors that were read have other names or shapes than those that they are for."""
    if odd := sorted(given.keys() ^ expected.keys()):
        raise UserError(f"{path} is not of this model: {odd[0]} is {'in' if odd[0] in given else 'missing from'} it")
    for name, tensor in given.items():
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{path} is not of this model: {name} is {list(tensor.shape)}, and {list(expected[name].shape)} there"
            )
