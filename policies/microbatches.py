"""How many tokens a microbatch should have."""

import math

import torch
from transformers import PretrainedConfig, PreTrainedModel

CPU_BYTES = 8192
"""Tokens of a microbatch on a CPU times bytes per number: few enough that activations stay in the CPU's caches."""
GPU_MEMORY_DIVISOR = 3
"""Activations may take the free memory divided by it: the rest is for gradients, buffers and fragmentation."""
ACTIVATIONS_PER_TOKEN = 34
"""Numbers kept per token and hidden unit in each layer (Korthikanti et al. 2022, section 4.1)."""
BFLOAT16_MULTIPLE = 32
"""The number of packed tokens in bfloat16 on a CPU is a multiple of it. oneDNN compiles its matrix products for each
new number of tokens; there are so few multiples that it caches them all, at the cost of 2 % more tokens."""


def default_microbatch_tokens(model: PreTrainedModel, width: int) -> int:
    """Tokens per microbatch that suit the device of a model and the memory that is free on it.

    width: the hidden size.
    """
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else None
    return microbatch_tokens(model.config, width, model.dtype.itemsize, free)


def microbatch_tokens(config: PretrainedConfig, width: int, bytes_per_number: int, free_bytes: float | None) -> int:
    """Tokens per microbatch: what suits a CPU's caches, or a power of two, but no less, that fits a GPU's free memory.

    Args:
        config: The configuration of the model.
        width: The hidden size.
        bytes_per_number: Bytes of a number of the model's dtype.
        free_bytes: The memory that is free on the GPU; None: the model is on a CPU.
    """
    on_cpu = CPU_BYTES // bytes_per_number
    if free_bytes is None:
        return on_cpu
    text = config.get_text_config()
    # Logits, their log-softmax and its gradient: three numbers per token and vocabulary entry.
    numbers = ACTIVATIONS_PER_TOKEN * text.num_hidden_layers * width + 3 * text.vocab_size
    tokens = free_bytes / GPU_MEMORY_DIVISOR / (numbers * bytes_per_number)
    return 2 ** int(math.log2(tokens)) if tokens > on_cpu else on_cpu


def packed_multiple(model: PreTrainedModel) -> int:
    """The number that the packed tokens of a forward pass must be a multiple of."""
    on_cpu = model.device.type == "cpu"
    return BFLOAT16_MULTIPLE if on_cpu and model.dtype == torch.bfloat16 else 1
