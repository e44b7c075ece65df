"""A base model and its tokenizer, from a folder or a hub name."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from policies.device import default_device
from policies.errors import UserError, first_line
from policies.files.quantization import four_bits, leave_packed
from policies.files.safe_reading import NO_CODE, SAFE, read_object
from policies.schema import ModelSettings, PolicySettings


def check_model_folder(path: str, needs_tokenizer: bool = True) -> None:
    """Refuse a path that looks like a folder and holds no model or, where one is needed, no tokenizer.

    A name like a hub's (`model` or `owner/model`) that is no folder here is left to the hub's client.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not _like_a_hub_name(path):
            raise UserError(f"model folder {path} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json: it is not a model in Hugging Face layout")
    if needs_tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model folder {path} has no tokenizer: save it there with tokenizer.save_pretrained({path!r})")


def _like_a_hub_name(path: str) -> bool:
    """One or two plain names, the first of two no folder here: `gpt2`, `owner/model`."""
    names = path.split("/")
    return (
        len(names) <= 2 and not path.startswith((".", "/", "~")) and not (len(names) == 2 and Path(names[0]).is_dir())
    )


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; it must have an end-of-sequence token, or no response would ever end."""
    check_model_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
    except Exception as error:  # the tokenizers library raises plain ones
        raise UserError(f"tokenizer of {path} cannot be loaded: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path} has no eos_token: without one no response would ever end")
    return tokenizer


LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""What transformers raises for a damaged folder."""

CONVERT = (
    "other files of weights are pickles, which run what they hold when they are read: load the model where it can be "
    "trusted, and save it by save_pretrained, which writes safetensors"
)


def check_weights(path: str) -> None:
    """Raise UserError where the weights in a model's folder are not in safetensors. A hub name is the hub's client's.

    transformers would heed file names in `config.json` and in an index, whatever kind of file they are of.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model folder {path} has an adapter_config.json, which names another model: remove the file")
    named = read_object(folder / "config.json").get("transformers_weights", "model.safetensors")
    files = [named, f"{named}.index.json"]
    if not isinstance(named, str) or Path(named).name != named or not named.removesuffix(_INDEX).endswith(_WEIGHTS):
        raise UserError(f"{path}/config.json: transformers_weights is {named!r}; a .safetensors file was expected")
    if not any((folder / name).is_file() for name in files):
        raise UserError(f"model {path} cannot be loaded: it has no {named}; {CONVERT}")
    for index in (folder / name for name in files if name.endswith(_INDEX) and (folder / name).is_file()):
        _check_index(index)


_WEIGHTS, _INDEX = ".safetensors", ".index.json"


def _check_index(path: Path) -> None:
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{path} is damaged: it has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(_WEIGHTS):
            raise UserError(f"{path}: {name!r} is no .safetensors file beside it; {CONVERT}")


def load_base(settings: ModelSettings, policy: PolicySettings | None = None) -> PreTrainedModel:
    """The causal language model, frozen, in evaluation mode, in the dtype of the settings, on the default device.

    With `policy.method: qlora` the weights of its linear layers, but for the output layer, are in four bits.
    """
    check_model_folder(settings.path)
    check_weights(settings.path)
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype)}
    if policy is not None and policy.spec.four_bits:
        options["quantization_config"] = four_bits(settings, policy)
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.path, **options, **SAFE)
    except LOADING_ERRORS as error:
        raise UserError(f"model {settings.path} cannot be loaded: {reason(error)}") from error
    model.requires_grad_(False)
    if "quantization_config" in options:
        leave_packed(model)
        return model.eval()
    return model.eval().to(default_device())


def load_model_config(path: str) -> AutoConfig:
    """The model's own configuration alone, without its weights."""
    check_model_folder(path)
    try:
        return AutoConfig.from_pretrained(path, **NO_CODE)
    except LOADING_ERRORS as error:
        raise UserError(f"model {path} cannot be read: {reason(error)}") from error


def load_generation_config(path: str) -> GenerationConfig:
    """The model's generation config; without one, what its configuration says of it."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError as error:
        if (Path(path) / "generation_config.json").is_file():
            raise UserError(f"{path}/generation_config.json cannot be read: {reason(error)}") from error
        return GenerationConfig.from_model_config(load_model_config(path))


def stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config."""
    configured = generation.eos_token_id if generation else None
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset([tokenizer.eos_token_id, *listed])


def reason(error: Exception) -> str:
    """Why transformers could not load something, in a line for people."""
    if "trust_remote_code" in str(error):
        return "it needs code from its own folder, which is never run here: use a model that transformers itself has"
    if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
        return f"it has no model.safetensors; {CONVERT}"
    return first_line(error)
