"""Attention of one new token a row, on the CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "align_decoding"


def use_decoding_attention(model: PreTrainedModel) -> None:
    """Where a model on the CPU attends by torch's fused kernel, decode by plain products: several times as fast there.

    The fused kernel is made for long queries, and wants keys and values repeated for each group of heads.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query: `[B, heads, T, D]`; key, value: `[B, groups, S, D]`; the mask is true, or 0, where a key is seen."""
    rows, heads, new, width = query.shape
    if new > 1 or torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = key.shape[1]
    scale = options.get("scaling") or width**-0.5
    scores = (query.view(rows, groups, heads // groups, width) * scale) @ key.transpose(2, 3)
    if attention_mask is not None:
        seen = attention_mask[..., : key.shape[2]]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, width), None
