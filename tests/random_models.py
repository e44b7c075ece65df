"""Small random models."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}
"""The configuration of a Llama for plans, which need no weights."""


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **sizes: float | None) -> Path:
    """Save a random Llama of two layers in float32, the same each time, with its tokenizer. Returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_precise_llama(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a random Llama with so little rounding that float32 gradients have six right digits. Returns the folder."""
    return save_llama(
        folder,
        tokenizer,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
