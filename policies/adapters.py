"""Adapters and heads on disk: PEFT's own two files, and `head.safetensors` beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from policies.errors import UserError
from policies.schema import PolicySettings

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
MODEL = "model.safetensors"


def lora_config(settings: PolicySettings, base: str) -> LoraConfig:
    """PEFT's description of the adapter; base: folder or hub name of the model that it is for."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets if isinstance(settings.targets, str) else list(settings.targets),
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def save_adapter(folder: Path, weights: Mapping[str, Tensor], settings: PolicySettings, base: str) -> None:
    """Write an adapter so that `peft.PeftModel.from_pretrained` loads it; base: the model that it is for.

    With `method: full` the weights are a model's, and transformers loads the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if settings.method == "full":
        AutoConfig.from_pretrained(base).save_pretrained(folder)
        save_file(tensors, folder / MODEL, metadata={"format": "pt"})
    else:
        lora_config(settings, base).save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS)


def save_head(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a scalar head beside the adapter that it goes with."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu() for name, tensor in weights.items()}, folder / HEAD)


def load_adapter(folder: str | Path, settings: PolicySettings) -> dict[str, Tensor]:
    """The weights of an adapter folder, or with `method: full` of a model's.

    Raises UserError where something is missing or not as `policy` says.
    """
    if settings.method == "full":
        return _load(Path(folder), MODEL, "a model in Hugging Face layout, which policy.method 'full' trains")
    weights = _load(Path(folder), WEIGHTS, "an adapter in PEFT layout")
    try:
        saved = json.loads((Path(folder) / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"folder {folder} has no readable {CONFIG}: it is not an adapter in PEFT layout") from error
    if saved.get("peft_type") != "LORA":
        raise UserError(f"{folder}/{CONFIG}: peft_type is {saved.get('peft_type')!r}, and policy.method is 'lora'")
    if odd := [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if saved.get(name)]:
        raise UserError(f"{folder}/{CONFIG}: {odd[0]} is set, which policy.method 'lora' does not have")
    for ours, theirs in (("rank", "r"), ("alpha", "lora_alpha")):
        if saved.get(theirs) != getattr(settings, ours):
            raise UserError(
                f"{folder}/{CONFIG}: {theirs} is {saved.get(theirs)}, and policy.{ours} is {getattr(settings, ours)}: "
                "set them alike"
            )
    return weights


def load_head(folder: str | Path) -> dict[str, Tensor]:
    """The weights of the scalar head of a reward or critic folder."""
    return _load(Path(folder), HEAD, "a reward model of align")


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
