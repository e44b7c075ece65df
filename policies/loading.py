"""A base model and its tokenizer, from a folder or a hub name."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policies.errors import UserError
from policies.schema import ModelSettings


def check_model_folder(path: str, needs_tokenizer: bool = True) -> None:
    """Refuse a path that looks like a folder and holds no model or, where one is needed, no tokenizer.

    A bare name (`owner/name`) that is no folder here is left to the hub's client.
    """
    folder = Path(path)
    if not folder.is_dir():
        looks_local = path.startswith((".", "/", "~")) or len(folder.parts) > 2 or folder.parent.is_dir()
        if looks_local and not (len(folder.parts) == 2 and not folder.parent.is_dir()):
            raise UserError(f"model folder {path} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json: it is not a model in Hugging Face layout")
    if needs_tokenizer and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model folder {path} has no tokenizer: save it there with tokenizer.save_pretrained({path!r})")


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; it must have an end-of-sequence token, or no response would ever end."""
    check_model_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer of {path} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path} has no eos_token: without one no response would ever end")
    return tokenizer


def load_base(settings: ModelSettings) -> PreTrainedModel:
    """The causal language model, frozen, in evaluation mode, in the dtype of the settings."""
    check_model_folder(settings.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.path, dtype=getattr(torch, settings.dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"model {settings.path} cannot be loaded: {_first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def load_model_config(path: str) -> AutoConfig:
    """The model's own configuration alone, without its weights."""
    check_model_folder(path)
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model {path} cannot be read: {_first_line(error)}") from error


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a response: the tokenizer's EOS and those of the generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return frozenset([tokenizer.eos_token_id, *listed])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
