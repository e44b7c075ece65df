"""Four-bit linear weights by bitsandbytes: Dettmers et al. 2023, "QLoRA"."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from policies.errors import UserError
from policies.schema import ModelSettings, PolicySettings


def four_bits(model: ModelSettings, policy: PolicySettings) -> BitsAndBytesConfig:
    """The config by which transformers quantises on loading; matrix products are in `model.dtype`.

    Raises UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"policy.method {policy.method} needs bitsandbytes: pip install 'align-rlhf[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=policy.quant_type,
        bnb_4bit_use_double_quant=policy.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype_for(policy)),
    )


def leave_packed(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights in place in forward passes without gradients on a CPU.

    Only one kernel reads that layout; passes with gradients, and ZeRO 3, would misread it.

    A quantised weight also forgets its layer, which it needed for quantisation alone: the two would be a cycle, which
    keeps the model's memory until the next full garbage collection.
    """
    for module in model.modules():
        if is_packed(module):
            setattr(module.weight, "module", None)  # noqa: B010  # not an attribute of every tensor
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # not an attribute of every module


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is in four bits."""
    return hasattr(getattr(module, "weight", None), "quant_state")


@torch.no_grad()
def dequantise(layer: Any) -> torch.Tensor:
    """The weight `[out, in]` that a four-bit layer multiplies by."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
