"""Makes a base model from nothing: a tokenizer trained on texts, and weights drawn at random."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from policies.errors import UserError, first_line
from policies.files.writing import save_model
from policies.schema import TokenizerSettings

PAD_TOKEN = "<pad>"
BOS_TOKEN = "<s>"
"""Begins every text, so that texts in training and prompts in sampling begin alike."""
EOS_TOKEN = "</s>"
BYTES = pre_tokenizers.ByteLevel.alphabet()
"""The tokens of single bytes, so that the tokenizer can encode any text."""
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id")
"""Keys of a configuration that follow from the tokenizer."""
KEYS_OF_ALL = {"model_type", "tie_word_embeddings"}
"""Keys that configurations of all families share, and that change the model."""


def train_tokenizer(texts: Sequence[str], settings: TokenizerSettings) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016; on bytes: Radford et al. 2019).

    Args:
        texts: The texts; the result does not depend on the machine or on the number of threads.
        settings: The size of the vocabulary, which is smaller where the texts have fewer pairs to merge.

    Raises:
        UserError: A special token is named twice, or is empty.
    """
    own = (PAD_TOKEN, BOS_TOKEN, EOS_TOKEN)
    special = [*own, *settings.special_tokens]
    if len(set(special)) < len(special) or "" in special:
        raise UserError(f"model.tokenizer.special_tokens: expected names, each once, and none of {', '.join(own)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(settings.vocab_size, len(BYTES) + len(special)),
        special_tokens=special,
        initial_alphabet=BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS_TOKEN} $A", special_tokens=[(BOS_TOKEN, tokenizer.token_to_id(BOS_TOKEN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=list(settings.special_tokens),
    )


def make_config(architecture: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """The configuration of a model with the vocabulary of a tokenizer.

    Args:
        architecture: `model_type`, and keys of its configuration class in transformers; others have its defaults.
        tokenizer: The tokenizer.

    Raises:
        UserError: transformers has no such causal language model, a key is unknown or follows from the tokenizer, or
            the values do not go together.
    """
    kind = architecture["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model.architecture.model_type {kind!r} is not a causal language model of transformers"
            f"{_suggestion(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    config_class = CONFIG_MAPPING[kind]
    known = _keys_of(config_class)
    for key in architecture:
        if key in FROM_TOKENIZER:
            raise UserError(
                f"model.architecture.{key} follows from the tokenizer: remove it; model.tokenizer.vocab_size sets the "
                "size of the vocabulary"
            )
        if key not in known:
            raise UserError(
                f"model.architecture.{key} is not a key of {config_class.__name__}{_suggestion(key, known)}"
            )
    values = {key: value for key, value in architecture.items() if key != "model_type"}
    try:
        return config_class(
            **values,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    except Exception as error:  # configuration classes have exceptions of their own
        raise _unusable(error) from error


def _keys_of(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keys of a configuration class that change the model."""
    own = set(config_class().to_dict()) - set(PreTrainedConfig().to_dict())
    return own | set(config_class.attribute_map) | KEYS_OF_ALL


def _suggestion(name: str, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f": did you mean {close[0]}?" if close else f"; expected one of {', '.join(sorted(known))}"


def _unusable(error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(f"model.architecture: no such model can be made: {lines[-1] if lines else first_line(error)}")


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random weights in float32, the same for the same seed.

    Raises UserError where the values of the configuration do not go together.
    """
    torch.manual_seed(seed)
    try:
        with torch.device("cpu"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # each model class has its own
        raise _unusable(error) from error


def write_base(
    folder: Path, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, seed: int, with_weights: bool = True
) -> None:
    """Write a base model as transformers does.

    Args:
        folder: The folder to write to.
        tokenizer: Its tokenizer.
        config: Its configuration.
        seed: Seed of its weights.
        with_weights: Whether to draw and write the weights; a plan does without.

    Raises:
        UserError: The values of the configuration do not go together.
    """
    if with_weights:
        save_model(random_model(config, seed), folder)
    else:
        _check_without_weights(config)
        config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_without_weights(config: PreTrainedConfig) -> None:
    """Raise UserError where no model can be made of a configuration."""
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each model class has its own
        raise _unusable(error) from error
