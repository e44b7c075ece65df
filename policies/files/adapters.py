"""Adapters and heads on disk: PEFT's own two files, and `head.safetensors` beside them."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from policies.errors import UserError
from policies.files.prompt_table import MARK, read_task
from policies.files.safe_reading import NO_CODE, read_object, read_tensors
from policies.module_names import FEEDFORWARD_OUTPUTS, keys_and_values, linears, named_so
from policies.schema import SOFT, PolicySettings

WEIGHTS, CONFIG, HEAD = "adapter_model.safetensors", "adapter_config.json", "head.safetensors"
MODEL = "model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before a name in the base."""
PROMPT = "prompt_embeddings"
"""PEFT's name of a soft prompt's numbers."""

PEFT_TYPES = {
    "lora": "LORA",
    "qlora": "LORA",
    "ia3": "IA3",
    "prompt_tuning": "PROMPT_TUNING",
    "p_tuning": "P_TUNING",
    "prefix_tuning": "PREFIX_TUNING",
    "layer_norm": "LN_TUNING",
    "bottleneck": "BOTTLENECK",
    "bitfit": "BITFIT",
    "top_layers": "TOP_LAYERS",
    "feature": "FEATURE",
}
"""What `adapter_config.json` calls a method; the last four are not PEFT's."""

_LORA = {"full_rank": "r", "full_alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
_SOFT = {"virtual_tokens": "num_virtual_tokens"}
FACTS = {
    "lora": _LORA,
    "qlora": _LORA,
    "prompt_tuning": _SOFT,
    "p_tuning": _SOFT,
    "prefix_tuning": _SOFT,
    "bottleneck": {"bottleneck": "bottleneck", "activation": "activation"},
    "top_layers": {"layers": "layers"},
}
"""Settings that an adapter's file must agree with, and their names there."""


def peft_config(settings: PolicySettings, base: PreTrainedModel) -> PeftConfig:
    """PEFT's description of the adapter that a method puts into this model's layers."""
    if settings.method == "ia3":
        targets, feedforward = keys_and_values(base)
        if settings.targets is not None:
            targets = named_so(linears(base), settings.target_names)
            feedforward = named_so(targets, FEEDFORWARD_OUTPUTS)
        return _ia3_config(targets, feedforward, base.config.name_or_path)
    return lora_config(settings, base.config.name_or_path)


def lora_config(settings: PolicySettings, base: str) -> LoraConfig:
    """PEFT's description of a LoRA adapter; base: folder or hub name of the model that it is for."""
    return LoraConfig(
        r=settings.full_rank,
        lora_alpha=settings.full_alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or "all-linear",
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def save_adapter(folder: Path, weights: Mapping[str, Tensor], settings: PolicySettings, base: str) -> None:
    """Write an adapter in PEFT's layout; base: the model that it is for.

    What PEFT has, `peft.PeftModel.from_pretrained` loads. With `method: full` the weights are a model's, and
    transformers loads the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    if settings.method == "full":
        AutoConfig.from_pretrained(base, **NO_CODE).save_pretrained(folder)
        save_file(tensors, folder / MODEL, metadata={"format": "pt"})
        return
    config = _saved_config(settings, base, weights)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / WEIGHTS)


def _saved_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    modules = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in weights})
    match settings.method:
        case "lora" | "qlora":
            config = lora_config(settings, base)
        case "ia3":
            config = _ia3_config(modules, named_so(modules, FEEDFORWARD_OUTPUTS), base)
        case "layer_norm":
            norms = [module.removesuffix(".ln_tuning_layers") for module in modules]
            config = LNTuningConfig(target_modules=norms, base_model_name_or_path=base, task_type="CAUSAL_LM")
        case "prompt_tuning" | "p_tuning" | "prefix_tuning":
            config = _prompt_config(settings, base, weights[PROMPT])
        case _:  # what PEFT does not have
            return {"peft_type": PEFT_TYPES[settings.method], "base_model_name_or_path": base} | {
                theirs: getattr(settings, ours) for ours, theirs in FACTS.get(settings.method, {}).items()
            }
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:  # the one way to PEFT's own form, sets made lists
        config.save_pretrained(folder)
        return json.loads((Path(folder) / CONFIG).read_text())


def _ia3_config(targets: list[str], feedforward: list[str], base: str) -> IA3Config:
    return IA3Config(
        target_modules=targets, feedforward_modules=feedforward, base_model_name_or_path=base, task_type="CAUSAL_LM"
    )


def _prompt_config(settings: PolicySettings, base: str, tokens: Tensor) -> PeftConfig:
    config = AutoConfig.from_pretrained(base, **NO_CODE).get_text_config()
    layers = config.num_hidden_layers
    sizes = {"token_dim": tokens.shape[1], "num_attention_heads": config.num_attention_heads}
    if settings.method == "prefix_tuning":
        states = tokens.shape[1] // (2 * layers)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = {"token_dim": states, "num_attention_heads": states // width}
    kinds = {"prompt_tuning": PromptTuningConfig, "p_tuning": PromptEncoderConfig, "prefix_tuning": PrefixTuningConfig}
    return kinds[settings.method](
        num_virtual_tokens=len(tokens),
        num_layers=layers,
        num_transformer_submodules=1,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
        **sizes,
    )


def save_head(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a scalar head beside the adapter that it goes with."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu() for name, tensor in weights.items()}, folder / HEAD)


def load_adapter(folder: str | Path, settings: PolicySettings) -> dict[str, Tensor]:
    """The weights of an adapter folder; with `method: full` of a model's, with a soft prompt also of TABLE#TASK.

    Raises UserError where something is missing or not as `policy` says.
    """
    if settings.method in SOFT and MARK in str(folder):
        return {PROMPT: read_task(str(folder))}
    if settings.method == "full":
        return _load(Path(folder), MODEL, "a model in Hugging Face layout, which policy.method 'full' trains")
    weights = _load(Path(folder), WEIGHTS, "an adapter in PEFT layout")
    try:
        saved = read_object(Path(folder) / CONFIG)
    except UserError as error:
        raise UserError(f"folder {folder} has no readable {CONFIG}: it is not an adapter in PEFT layout") from error
    expected = PEFT_TYPES[settings.method]
    if saved.get("peft_type") != expected:
        raise UserError(
            f"{folder}/{CONFIG}: peft_type is {saved.get('peft_type')!r}, and policy.method {settings.method!r} "
            f"reads {expected!r}"
        )
    if odd := [name for name in ("rank_pattern", "alpha_pattern") if saved.get(name)]:
        raise UserError(f"{folder}/{CONFIG}: {odd[0]} is set, which policy.method {settings.method!r} does not have")
    for ours, theirs in FACTS.get(settings.method, {}).items():
        if saved.get(theirs) != getattr(settings, ours):
            raise UserError(
                f"{folder}/{CONFIG}: {theirs} is {saved.get(theirs)}, and policy.{ours.removeprefix('full_')} is "
                f"{getattr(settings, ours)}: set them alike"
            )
    return weights


def load_head(folder: str | Path) -> dict[str, Tensor]:
    """The weights of the scalar head of a reward or critic folder."""
    return _load(Path(folder), HEAD, "a reward model of align")


def tensor_digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """BLAKE2b, the fastest hash here without a chance of collisions, of each tensor: dtype, shape and bytes."""
    made = {}
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=32)
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        made[name] = digest.hexdigest()
    return made


def weights_digest(of_each: Mapping[str, str]) -> str:
    """One hash of names and digests: two sides that agree on it hold the same weights."""
    return hashlib.blake2b(json.dumps(of_each, sort_keys=True).encode(), digest_size=32).hexdigest()


def _load(folder: Path, name: str, what: str) -> dict[str, Tensor]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist: it should be {what}")
    if not (folder / name).is_file():
        raise UserError(f"folder {folder} has no {name}: it is not {what}")
    return read_tensors(folder / name)
