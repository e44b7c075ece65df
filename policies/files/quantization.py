"""Four-bit linear weights by bitsandbytes: Dettmers et al. 2023, "QLoRA"."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from policies.errors import UserError
from policies.schema import ModelSettings, PolicySettings


def four_bits(model: ModelSettings, policy: PolicySettings) -> BitsAndBytesConfig:
    """How transformers quantises on loading. Products are in `model.dtype`. Raises UserError where it is not there."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("policy.method qlora needs bitsandbytes: pip install 'align-rlhf[qlora]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=policy.quant_type,
        bnb_4bit_use_double_quant=policy.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
    )


def leave_packed(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights anew, in place, in passes without gradients on a CPU.

    What it packs so is a layout for one kernel alone; passes with gradients, and ZeRO 3, would read it wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # not an attribute of every module


def is_packed(module: nn.Module) -> bool:
    """Whether a layer's weight is in four bits."""
    return hasattr(getattr(module, "weight", None), "quant_state")


@torch.no_grad()
def dequantise(layer: Any) -> torch.Tensor:
    """The weight of a four-bit layer as its products see it, `[out, in]`."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
