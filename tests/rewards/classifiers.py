"""Random classifiers of several families, and their logits by plain transformers."""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
"""A template that ends the assistant's turns with EOS."""
EOS = 1
VOCABULARY = 300


def config_of(family: str, positions: int = 512) -> dict[str, Any]:
    """The settings of a model of one layer in the names of its family."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
    }
    if family == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    elif family == "bloom":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    elif family == "opt":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
        sizes["word_embed_proj_dim"] = 16
    elif family == "xlnet":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    elif family == "t5":
        sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        sizes["decoder_start_token_id"] = 0
    return sizes


def make(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    pad: int | None = 0,
    positions: int = 512,
) -> str:
    """Write a random classifier with a tokenizer, and give its folder; its scores are of order one."""
    torch.manual_seed(5)
    names = {"num_labels": 1, "pad_token_id": pad, "eos_token_id": EOS, "bos_token_id": None}
    config = AutoConfig.for_model(family, **config_of(family, positions), **names)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in (parameter for parameter in model.parameters() if parameter.dim() > 1):
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_changes(
    tokenizer: PreTrainedTokenizerFast, template: str | None = None, pad: str | None = "<pad>", first: str = ""
) -> PreTrainedTokenizerFast:
    """A copy of a tokenizer with this template and pad token; `first`: a token before every text."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    changed.pad_token = pad
    if first:
        special = [(first, changed.convert_tokens_to_ids(first))]
        changed.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=special)
    return changed


@torch.no_grad()
def alone(path: str, sequences: list[list[int]]) -> Tensor:
    """The scores `[N]` of one sequence of ids at a time, by transformers as it comes."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    return torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in sequences])


def encoded(path: str, prompt: Any, response: str) -> list[int]:
    """The ids of a prompt and its response, by the folder's own tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt + response)["input_ids"])
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    conversation = [*messages, {"role": "assistant", "content": response}]
    return list(tokenizer.apply_chat_template(conversation, return_dict=True)["input_ids"])
