"""Adapters and heads on disk, in PEFT's layout: `adapter_config.json`, `adapter_model.safetensors`, `head.safetensors`."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from policies.errors import UserError
from policies.heads import ScalarHead

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"


def save_adapter(folder: Path, weights: Mapping[str, Tensor], config: LoraConfig, head: ScalarHead | None = None) -> None:
    """Write an adapter, and the head that goes with it, so that `peft.PeftModel.from_pretrained` loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    if head is not None:
        save_file({name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}, folder / HEAD)


def load_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The weights of an adapter folder. Raises UserError naming what is missing."""
    return _load(Path(folder), WEIGHTS, "an adapter in PEFT layout")


def load_head(folder: str | Path, width: int) -> ScalarHead:
    """The scalar head of a reward or critic folder for hidden states of `width`."""
    state = _load(Path(folder), HEAD, "a reward model of align")
    head = ScalarHead(width)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{folder}/{HEAD} does not fit a model {width} wide: it was made for another base") from error
    return head


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes: two sides that agree on it hold the same adapter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _load(folder: Path, name: str, what: str) -> dict[str, Tensor]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist: it should be {what}")
    if not (folder / name).is_file():
        raise UserError(f"folder {folder} has no {name}: it is not {what}")
    try:
        return load_file(folder / name)
    except SafetensorError as error:
        raise UserError(f"{folder / name} is damaged: {error}") from error
