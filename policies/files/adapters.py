"""Adapters and heads on disk: PEFT's own two files, and `head.safetensors` beside them."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig

from policies.errors import UserError
from policies.files.complete_weights import is_finite
from policies.files.prompt_table import MARK, read_task
from policies.files.safe_reading import NO_CODE, read_object, read_tensors
from policies.files.writing import save_tensors
from policies.schema import PolicySettings

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "head.safetensors"
MODEL = "model.safetensors"
PREFIX = "base_model.model."
"""What PEFT prepends to a name in the base."""
PROMPT = "prompt_embeddings"
"""PEFT's name for the tensor of a soft prompt."""
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "alora_invocation_tokens")
"""PEFT's settings that change what an adapter computes, and not the names and shapes of its tensors."""
INIT = "init_lora_weights"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the values of `init_lora_weights` with which PEFT changes the base's weights, though it saves only the
adapter. The others leave the base as it is: true, false, gaussian, eva, orthogonal and mica."""


def save_adapter(folder: Path, weights: Mapping[str, Tensor], settings: PolicySettings, base: str) -> None:
    """Write what is trained of a role, in PEFT's layout where the roles share a base.

    `peft.PeftModel.from_pretrained` loads the methods that PEFT has. Where each role is a complete model
    (`method: full`), transformers loads the folder.

    Args:
        folder: The folder to write to; it is created if it does not exist.
        weights: The tensors by name in the file.
        settings: The adaptation method and its settings.
        base: Folder or hub name of the model that the adapter is for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if not settings.spec.shares_base:
        AutoConfig.from_pretrained(base, **NO_CODE).save_pretrained(folder)
        save_tensors(tensors, folder / MODEL, metadata={"format": "pt"})
        return
    config = _adapter_config(settings, base, weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tensors(tensors, folder / WEIGHTS)


def _adapter_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    spec = settings.spec
    if not spec.in_peft:
        config: dict[str, Any] = {"peft_type": spec.peft_type, "base_model_name_or_path": base}
        for name, name_in_file in spec.saved_settings.items():
            config[name_in_file] = getattr(settings, name)
        return config
    peft_config: PeftConfig = spec.load_peft_config()(settings, base, weights)
    peft_config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:  # only PEFT's own saving turns its sets into lists
        peft_config.save_pretrained(folder)
        return read_object(Path(folder) / CONFIG)


def adapted_modules(weights: Mapping[str, Tensor]) -> list[str]:
    """Names in the base of the modules that an adapter's weights belong to, sorted."""
    return sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in weights})


def save_head(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a head to the folder of the adapter that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors({name: tensor.detach().cpu() for name, tensor in weights.items()}, folder / HEAD)


def load_adapter(folder: str | Path, settings: PolicySettings, residual_base: bool = False) -> dict[str, Tensor]:
    """Read what `save_adapter` has written.

    Args:
        folder: The adapter's folder; with `method: full` a model's; with a soft prompt also FILE#TASK, a task of a
            prompt table.
        settings: The settings that it must agree with.
        residual_base: Whether the base model is what PEFT's initialisation left of the original one, so that an
            adapter that started from such an initialisation fits it.

    Returns:
        The tensors by name in the file, on the CPU.

    Raises:
        UserError: A file is missing or does not match `policy`, a number is not finite, or the adapter is for a base
            that its initialisation has changed.
    """
    spec = settings.spec
    if spec.prompt_kind is not None and MARK in str(folder):
        return {PROMPT: read_task(str(folder))}
    if not spec.shares_base:
        kind = f"a model in Hugging Face layout, which policy.method {spec.name!r} trains"
        return _read_weights(Path(folder), MODEL, kind)
    weights = _read_weights(Path(folder), WEIGHTS, "an adapter in PEFT layout")
    saved = _read_adapter_config(Path(folder), settings)
    if not residual_base:
        check_base_unchanged(saved, Path(folder) / CONFIG)
    return weights


def check_base_unchanged(config: Mapping[str, Any], path: Path) -> None:
    """Raise UserError where an adapter is for a base that its initialisation has changed.

    Args:
        config: The content of its `adapter_config.json`.
        path: Path of that file, for the message.
    """
    init = config.get(INIT)
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{path}: {INIT} is {init!r}, with which PEFT changed the base: the adapter does not fit the base model "
            "itself. Convert it by PEFT, model.save_pretrained(..., path_initial_model_for_weight_conversion=...); or, "
            "where model.path is the changed base, set sft.adapter_base: residual"
        )


def _read_adapter_config(folder: Path, settings: PolicySettings) -> dict[str, Any]:
    """The content of `adapter_config.json`. Raises UserError where it does not agree with the settings."""
    spec = settings.spec
    try:
        saved = read_object(folder / CONFIG)
    except UserError as error:
        raise UserError(f"folder {folder} has no readable {CONFIG}: it is not an adapter in PEFT layout") from error
    if saved.get("peft_type") != spec.peft_type:
        raise UserError(
            f"{folder}/{CONFIG}: peft_type is {saved.get('peft_type')!r}, but policy.method {spec.name!r} "
            f"reads {spec.peft_type!r}"
        )
    for name in UNSUPPORTED:
        if saved.get(name):
            raise UserError(f"{folder}/{CONFIG}: {name} is set, which policy.method {spec.name!r} does not support")
    for name, name_in_file in spec.saved_settings.items():
        expected = getattr(settings, name)
        if saved.get(name_in_file) != expected:
            raise UserError(
                f"{folder}/{CONFIG}: {name_in_file} is {saved.get(name_in_file)}, but policy."
                f"{name.removeprefix('full_')} is {expected}: set both to the same value"
            )
    return saved


def load_head(folder: str | Path, kind: str = "a reward model of align") -> dict[str, Tensor]:
    """Read the head of a reward model, critic or classifier.

    Args:
        folder: The folder of the model.
        kind: What the folder should be, for messages.

    Returns:
        Its tensors on the CPU: `weight` `[H]` and `bias` `[1]` of a scalar head, `weight` `[C, H]` of a classifier's.

    Raises:
        UserError: The folder or the file does not exist, or the file is damaged.
    """
    return _read_weights(Path(folder), HEAD, kind)


def tensor_digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """BLAKE2b digest of each tensor's dtype, shape and bytes, by name; the fastest collision-resistant hash here."""
    digests: dict[str, str] = {}
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=32)
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests


def weights_digest(digests: Mapping[str, str]) -> str:
    """One digest over the names and digests of all tensors: two sides that agree on it hold the same weights."""
    return hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=32).hexdigest()


def _read_weights(folder: Path, name: str, kind: str) -> dict[str, Tensor]:
    """The tensors of one file. kind: what the folder should be, for messages."""
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist: it should be {kind}")
    if not (folder / name).is_file():
        raise UserError(f"folder {folder} has no {name}: it is not {kind}")
    weights = read_tensors(folder / name)
    for tensor_name, tensor in weights.items():
        if not is_finite(tensor):
            raise UserError(f"{folder / name}: {tensor_name} holds NaN or infinite numbers")
    return weights
