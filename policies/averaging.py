"""The weighted mean of several adapters."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from policies.errors import UserError
from policies.files.adapters import CONFIG, MODEL, WEIGHTS, check_base_unchanged
from policies.files.safe_reading import check_names_and_shapes, read_object, read_tensors
from policies.files.writing import save_tensors

MODEL_CONFIG = "config.json"
KIND_KEYS = ("peft_type", "model_type")
"""The keys that say what kind of adapter or model it is: where two configs differ, these are reported first."""
BASE_KEY = "base_model_name_or_path"
"""A key that may differ between adapters: the base may have been in another folder."""


def average_adapters(folders: Sequence[Path], shares: Sequence[float], to: Path) -> None:
    """Average adapters, or complete models, of one kind, with their heads: the weighted mean of each parameter.

    It is meant for adapters with the same initialisation: policies of several seeds from one SFT adapter (Wortsman et
    al. 2022, "Model soups"), or members of an ensemble of reward models (Ramé et al. 2024, "WARM"). LoRA's factors are
    averaged, not their products.

    Args:
        folders: The folder of each adapter.
        shares: The weight of each, positive; scaled here to a sum of 1.
        to: The folder that the mean is written to; it is created if it does not exist.

    Raises:
        UserError: A folder is not an adapter, the adapters are of different kinds, or they are for a base that their
            initialisation has changed.
    """
    first = folders[0]
    config_file = CONFIG if (first / CONFIG).is_file() else MODEL_CONFIG
    config = read_object(first / config_file)
    files = sorted(path.name for path in first.glob("*.safetensors"))
    if WEIGHTS not in files and MODEL not in files:
        raise UserError(f"{first} has neither {WEIGHTS} nor {MODEL}: it is not an adapter")
    for folder in folders[1:]:
        _check_same_kind(read_object(folder / config_file), config, folder / config_file, first)
    check_base_unchanged(config, first / config_file)
    means: dict[str, dict[str, Tensor]] = {}
    for name in files:
        means[name] = _mean([folder / name for folder in folders], shares)
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(first / config_file, to / config_file)
    for name, mean in means.items():
        save_tensors(mean, to / name, metadata={"format": "pt"} if name == MODEL else None)


def _check_same_kind(config: Mapping[str, Any], expected: Mapping[str, Any], path: Path, first: Path) -> None:
    """Raise UserError where the config of an adapter, read from `path`, differs from that of the first one."""
    keys = config.keys() | expected.keys()
    different = [key for key in keys if config.get(key) != expected.get(key) and key != BASE_KEY]
    if different:
        key = min(different, key=lambda name: (name not in KIND_KEYS, name))
        raise UserError(
            f"{path}: {key} is {config.get(key)!r}, but {expected.get(key)!r} in {first}: only adapters of one kind "
            "can be averaged"
        )


def _mean(files: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the tensors of several files, summed in float64, in the dtype of the first."""
    first = read_tensors(files[0])
    sums = {name: tensor.double() * shares[0] for name, tensor in first.items()}
    for file, share in zip(files[1:], shares[1:], strict=True):
        tensors = read_tensors(file)
        check_names_and_shapes(tensors, first, file)
        for name, tensor in tensors.items():
            sums[name] += tensor.double() * share
    total = sum(shares)
    return {name: (sums[name] / total).to(tensor.dtype) for name, tensor in first.items()}
