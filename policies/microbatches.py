"""How many tokens a microbatch should have."""

import math

import torch
from transformers import PreTrainedModel

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
    """Tokens per microbatch: what suits a CPU's caches, or a power of two that fits a GPU's free memory.

    width: the hidden size.
    """
    bytes_per_number = model.dtype.itemsize
    on_cpu = CPU_BYTES // bytes_per_number
    if model.device.type != "cuda":
        return on_cpu
    free, _ = torch.cuda.mem_get_info(model.device)
    config = model.config
    # Logits, their log-softmax and its gradient: three numbers per token and vocabulary entry.
    numbers = ACTIVATIONS_PER_TOKEN * config.num_hidden_layers * width + 3 * config.vocab_size
    tokens = free / GPU_MEMORY_DIVISOR / (numbers * bytes_per_number)
    return max(on_cpu, 2 ** int(math.log2(tokens)))


def packed_multiple(model: PreTrainedModel) -> int:
    """The number that the packed tokens of a forward pass must be a multiple of."""
    on_cpu = model.device.type == "cpu"
    return BFLOAT16_MULTIPLE if on_cpu and model.dtype == torch.bfloat16 else 1
