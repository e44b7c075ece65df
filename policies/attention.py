"""Attention to rows without padding; on the CPU, of one new token a row, and of rows that see themselves alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from policies import native
from policies.packing import Rows, starts_of

NAME = "align"
SHORT = 2**16
"""Tokens of a row, times the width of a head, up to which our kernel is faster than torch's, which takes keys by blocks
and is made for long rows. Torch's also wants keys and values repeated for each group of heads."""
FEW = 2**20
"""Numbers in the keys up to which decoding is in float32: its shapes are new at each token, and for each new shape of a
product in bfloat16 oneDNN compiles a kernel, 3 to 4 ms."""


def use_own_attention(model: PreTrainedModel) -> None:
    """Where a model attends by torch's fused kernel, let it see rows that stand one after another each alone.

    On the CPU, attend by our own kernel where it is faster.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query: `[B, heads, T, D]`; key, value: `[B, groups, S, D]`; the mask is true, or 0, where a key is seen.

    With `rows` among the options, B is 1, T the tokens of all rows, and each row sees itself alone, whatever the mask.
    """
    rows: Rows | None = options.pop("rows", None)
    scale = options.get("scaling") or query.shape[3] ** -0.5
    if native.runs(query, key, value) and not options.get("dropout"):
        starts = _short_rows(rows, query, key, value, attention_mask)
        if starts is not None:
            flat = (states.transpose(1, 2).flatten(0, 1).contiguous() for states in (query, key, value))
            return _OwnAttention.apply(*flat, scale, starts).view(query.transpose(1, 2).shape), None
    if query.device.type == "cpu" and query.shape[2] == 1 and rows is None and not torch.is_grad_enabled():
        return _decoding(query, key, value, attention_mask, scale), None
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = (states[0].transpose(0, 1).split(rows.sizes) for states in (query, key, value))
    apart = []
    for block, *part in zip(rows.blocks, *parts, strict=True):
        padded = (block.pad(states).transpose(1, 2) for states in part)
        apart.append(block.unpad(sdpa_attention_forward(module, *padded, None, **options)[0]))
    return torch.cat(apart).unsqueeze(0), None


def _short_rows(rows: Rows | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Where rows begin that are short and see themselves alone; None where one is long, or a mask says more."""
    batch, _, tokens, width = query.shape
    if value.shape[3] != width or (rows is None and (mask is not None or key.shape[2] != tokens)):
        return None
    longest = tokens if rows is None else rows.lengths[-1]
    if longest * width > SHORT:
        return None
    return starts_of([tokens] * batch) if rows is None else rows.starts


def _decoding(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    (rows, heads, _, width), groups, dtype = query.shape, key.shape[1], value.dtype
    if dtype.itemsize == 2 and key.numel() <= FEW:
        query, key, value = query.float(), key.float(), value.float()
    scores = (query.view(rows, groups, heads // groups, width) * scale) @ key.transpose(2, 3)
    if mask is not None:
        seen = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, width).to(dtype)


class _OwnAttention(torch.autograd.Function):
    """Causal attention `[N, heads, D]` of rows that stand one after another, each to itself.

    key, value: `[N, groups, D]`; the queries of a group of heads share its keys. Kept for the way back is a number for
    each head of each token, from which the weights are made again (Dao et al. 2022, appendix B).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, starts: Tensor) -> Tensor:
        (tokens, heads, width), out = query.shape, torch.empty_like(query)
        normalisers = query.new_empty(tokens, heads, dtype=torch.float32)
        ctx.shape = starts, len(starts) - 1, heads, key.shape[1], width, scale
        native.call("attention", query, key, value, *ctx.shape, out, normalisers)
        ctx.save_for_backward(query, key, value, out, normalisers)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalisers = ctx.saved_tensors
        made = [torch.empty_like(states) for states in (query, key, value)]
        given = query, key, value, *ctx.shape, out, normalisers, gradient.contiguous()
        native.call("attention_backward", *given, *made)
        return *made, None, None
