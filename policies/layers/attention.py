"""Attention to rows without padding; on the CPU, of one new token a row, and of rows that see themselves alone."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from policies.layers import native
from policies.layers.packing import PackedSequences, cu_seqlens_of

NAME = "align"
SHORT = 2**16
"""Tokens of a row, times the width of a head, up to which our kernel is faster than torch's, which takes keys by blocks
and is made for long rows. Torch's also wants keys and values repeated for each group of heads."""


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
    rows: PackedSequences | None = options.pop("rows", None)
    scale = float(options.get("scaling") or query.shape[3] ** -0.5)
    if native.runs(query, key, value) and not options.get("dropout"):
        starts = _short_rows(rows, query, key, value, attention_mask)
        if starts is not None:
            flat = (states.transpose(1, 2).flatten(0, 1).contiguous() for states in (query, key, value))
            return _OwnAttention.apply(*flat, scale, starts).view(query.transpose(1, 2).shape), None
        if rows is None and (seen := _seen_by_new(query, key, value, attention_mask)) is not None:
            return attend_new(query.squeeze(2).contiguous(), key, value, seen, scale).unsqueeze(1), None
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = (states[0].transpose(0, 1).split(rows.sizes) for states in (query, key, value))
    apart = []
    for block, *part in zip(rows.blocks, *parts, strict=True):
        padded = (block.pad(states).transpose(1, 2) for states in part)
        apart.append(block.unpad(sdpa_attention_forward(module, *padded, None, **options)[0]))
    return torch.cat(apart).unsqueeze(0), None


def _short_rows(
    rows: PackedSequences | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor | None:
    """Where rows begin that are short and see themselves alone; None where one is long, or a mask says more."""
    batch, _, tokens, width = query.shape
    if value.shape[3] != width or (rows is None and (mask is not None or key.shape[2] != tokens)):
        return None
    longest = tokens if rows is None else rows.lengths[-1]
    if longest * width > SHORT:
        return None
    return cu_seqlens_of([tokens] * batch) if rows is None else rows.cu_seqlens


def _seen_by_new(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """`[B, S]`, what one new token a row sees; None where there are more, gradients flow, or a mask says more."""
    in_order = key.stride() == value.stride() and key.stride()[2:] == (key.shape[3], 1) and key.shape == value.shape
    if query.shape[2] != 1 or not in_order or torch.is_grad_enabled():
        return None
    batch, _, tokens, _ = key.shape
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.long)
    if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0, :tokens].expand(batch, -1).long()


def attend_new(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention `[B, heads, D]` of one new token a row to those that are there, on the CPU.

    query: `[B, heads, D]`, heads of a row beside each other; key, value: `[B, groups, S, D]`, tokens of a group beside
    each other; seen: `[B, S]` int64, 0 where a token is not seen.
    """
    (batch, heads, width), (_, groups, tokens, _) = query.shape, key.shape
    made = query.new_empty(query.shape)
    lies = query.data_ptr(), query.stride(0), key.data_ptr(), value.data_ptr(), *key.stride()[:2]
    native.call("attend_new", query.dtype, *lies, seen, batch, heads, groups, width, tokens, scale, made)
    return made


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
        native.call("attention", query.dtype, query, key, value, *ctx.shape, out, normalisers)
        ctx.save_for_backward(query, key, value, out, normalisers)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalisers = ctx.saved_tensors
        made = [torch.empty_like(states) for states in (query, key, value)]
        given = query, key, value, *ctx.shape, out, normalisers, gradient.contiguous()
        native.call("attention_backward", query.dtype, *given, *made)
        return *made, None, None
