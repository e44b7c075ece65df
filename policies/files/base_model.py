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
from policies.files.complete_weights import load_complete
from policies.files.quantization import four_bits, leave_packed
from policies.files.safe_reading import NO_CODE, read_object
from policies.schema import ModelSettings, PolicySettings
from policies.text.chat_templates import use_template
from policies.text.encoder import TextEncoder

LOADING_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError)
"""Exceptions that transformers raises for a damaged folder."""
CONVERT = (
    "other weight files are pickles, which run code when they are read: load the model where it can be trusted, and "
    "save it with save_pretrained, which writes safetensors"
)
"""Advice for a model whose weights are not in safetensors."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Every tokenizer that transformers can load has one of these files."""
WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"


def check_model_folder(path: str, needs_tokenizer: bool = True) -> None:
    """Check that a model's folder contains a model.

    Args:
        path: Folder, or a hub name (`model` or `owner/model`), which is left to the hub's client.
        needs_tokenizer: Whether it must contain a tokenizer, too.

    Raises:
        UserError: The folder does not exist, or has no model or no tokenizer.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not _looks_like_hub_name(path):
            raise UserError(f"model folder {path} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {path} has no config.json: it is not a model in Hugging Face layout")
    if needs_tokenizer and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"model folder {path} has no tokenizer: save it there with tokenizer.save_pretrained({path!r})")


def _looks_like_hub_name(path: str) -> bool:
    """Whether it has the form `gpt2` or `owner/model`, where `owner` is not a local folder."""
    if path.startswith((".", "/", "~")):
        return False
    owner, *names = path.split("/")
    return not names or (len(names) == 1 and not Path(owner).is_dir())


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Folder or hub name of the model.

    Raises:
        UserError: It cannot be loaded, has no end-of-sequence token, without which no response would end, or has a
            token for which the model's embeddings have no row.
    """
    check_model_folder(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
    except Exception as error:  # the tokenizers library raises plain ones
        raise UserError(f"tokenizer of {path} cannot be loaded: {reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path} has no eos_token: without one no response would ever end")
    check_token_ids(tokenizer, path)
    return tokenizer


def load_model_tokenizer(model: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model as the settings say, with their chat template.

    Raises:
        UserError: As for `load_tokenizer`, and for the chat template as for `use_template`.
    """
    tokenizer = load_tokenizer(model.path)
    if model.chat_template is not None:
        use_template(tokenizer, model.chat_template)
    return tokenizer


def check_token_ids(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Raise UserError where a token has an id beyond the rows of the model's embeddings.

    Rows without a token are common, and do no harm.

    Args:
        tokenizer: The tokenizer.
        path: Folder or hub name of the model.
    """
    rows = getattr(load_model_config(path).get_text_config(), "vocab_size", None)
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__)
    if rows is not None and vocabulary[last] >= rows:
        raise UserError(
            f"tokenizer of {path}: {last!r} has id {vocabulary[last]}, but the model's embeddings have {rows} rows: "
            "call model.resize_token_embeddings(len(tokenizer)), and save the model and the tokenizer again"
        )


def check_weights(path: str) -> None:
    """Raise UserError where the weights in a model's folder are not in safetensors. Hub names are not checked.

    transformers loads whatever file `config.json` or an index names, of any format.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model folder {path} has an adapter_config.json, which names another model: remove the file")
    weights = read_object(folder / "config.json").get("transformers_weights", "model.safetensors")
    if not isinstance(weights, str) or not _is_safetensors_beside(weights.removesuffix(INDEX_SUFFIX)):
        raise UserError(f"{path}/config.json: transformers_weights is {weights!r}; expected a .safetensors file")
    files = [folder / weights, folder / f"{weights}{INDEX_SUFFIX}"]
    existing = [file for file in files if file.is_file()]
    if not existing:
        raise UserError(f"model {path} cannot be loaded: it has no {weights}; {CONVERT}")
    for file in existing:
        if file.name.endswith(INDEX_SUFFIX):
            _check_index(file)


def _check_index(path: Path) -> None:
    """Raise UserError where an index names a file that is not in safetensors, or in another folder."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path} is damaged: it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_safetensors_beside(name):
            raise UserError(f"{path}: {name!r} is not a .safetensors file in the same folder; {CONVERT}")


def _is_safetensors_beside(name: str) -> bool:
    """Whether a name is that of a safetensors file in the same folder."""
    return Path(name).name == name and name.endswith(WEIGHTS_SUFFIX)


def load_base(settings: ModelSettings, policy: PolicySettings | None = None) -> PreTrainedModel:
    """Load a causal language model, frozen, in evaluation mode, on the default device.

    Args:
        settings: Its folder or hub name, and its dtype.
        policy: The adaptation method; for `qlora` the weights of all linear layers except the LM head are quantised to
            four bits. None: no weights are quantised.

    Raises:
        UserError: The model cannot be loaded, its weights are not in safetensors, or some are missing or not finite.
    """
    check_model_folder(settings.path)
    check_weights(settings.path)
    options: dict[str, Any] = {"dtype": getattr(torch, settings.dtype_for(policy))}
    if policy is not None and policy.spec.four_bits:
        options["quantization_config"] = four_bits(settings, policy)
    try:
        model = load_complete(AutoModelForCausalLM, settings.path, default_device(), **options)
    except LOADING_ERRORS as error:
        raise UserError(f"model {settings.path} cannot be loaded: {reason(error)}") from error
    model.requires_grad_(False)
    if "quantization_config" in options:
        leave_packed(model)
    return model.eval()


def load_model_config(path: str) -> AutoConfig:
    """The configuration of a model, without its weights. Raises UserError where it cannot be read."""
    check_model_folder(path)
    try:
        return AutoConfig.from_pretrained(path, **NO_CODE)
    except LOADING_ERRORS as error:
        raise UserError(f"model {path} cannot be read: {reason(error)}") from error


def load_generation_config(path: str) -> GenerationConfig:
    """The generation config of a model; where it has none, what its configuration says about generation.

    Raises UserError where it cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError as error:
        if (Path(path) / "generation_config.json").is_file():
            raise UserError(f"{path}/generation_config.json cannot be read: {reason(error)}") from error
        load_model_config(path)  # it says what is wrong, if anything is
        # The config that transformers loads has lost its settings of generation: only the file has them.
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)


def stop_ids(generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a response: EOS, the chat template's end of a turn, and those of the generation config."""
    ids = set(TextEncoder(tokenizer).end_ids)
    configured = generation.eos_token_id if generation else None
    if isinstance(configured, list):
        ids.update(configured)
    elif configured is not None:
        ids.add(configured)
    return frozenset(ids)


def reason(error: Exception) -> str:
    """Why transformers could not load something, in one line."""
    if "trust_remote_code" in str(error):
        return "it needs code from its own folder, which is never run here: use a model class of transformers itself"
    if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
        return f"it has no model.safetensors; {CONVERT}"
    if "automatic conversion of the weights" in str(error):
        return "weights that it stacks, such as those of experts, are missing or differ in shape"
    return first_line(error)
