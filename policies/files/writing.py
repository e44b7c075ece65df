"""Writes files whose mode follows the user's umask.

safetensors writes a temporary file, which only its owner may read, and renames it; the mode stays.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file with the mode of any new file, or of the file that it replaces.

    Args:
        tensors: The tensors by name, contiguous and without shared storage.
        path: The file.
        metadata: Texts for the file's header.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as its `save_pretrained` does, with weights of the mode of any new file.

    Args:
        model: The model.
        folder: The folder to write to; it is created if it does not exist.
    """
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / CONFIG_NAME, path)
