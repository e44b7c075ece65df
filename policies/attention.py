"""Attention to rows without padding; on the CPU, of one new token a row, and of short rows while gradients flow."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from policies.packing import Block, Rows

NAME = "align"
SHORT = {torch.float32: 4, torch.bfloat16: 8}
"""Tokens of a row, in widths of a head, up to which plain products are faster than the fused kernel, whose backward
pass is slow in bfloat16. Beyond, what they write, a number for each pair of tokens, is far more than the states."""

WIDE = 128
"""Width of a head from which plain products stay in bfloat16. Narrower ones gain nothing by it, and for each new shape
of a product in bfloat16 oneDNN compiles a kernel, 3 to 4 ms."""
FEW = 2**20
"""Numbers in the keys up to which decoding, whose shapes are new at each token, is in float32 for the same reason."""


def use_own_attention(model: PreTrainedModel) -> None:
    """Where a model attends by torch's fused kernel, let it see rows that stand one after another each alone.

    On the CPU, attend by plain products where they are faster: the fused kernel is made for long rows, and wants keys
    and values repeated for each group of heads.
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
    width, scale = query.shape[3], options.get("scaling") or query.shape[3] ** -0.5
    if query.device.type == "cpu" and not options.get("dropout"):
        if torch.is_grad_enabled() and (short := _short_rows(rows, query, key, value, attention_mask)):
            dtype = torch.float32 if query.dtype == torch.bfloat16 and width < WIDE else query.dtype
            flat = (states.transpose(1, 2).flatten(0, 1).to(dtype) for states in (query, key, value))
            made = _ShortAttention.apply(*flat, scale, short)
            return made.to(query.dtype).view(query.transpose(1, 2).shape), None
        if query.shape[2] == 1 and rows is None and not torch.is_grad_enabled():
            return _decoding(query, key, value, attention_mask, scale), None
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    parts = (states[0].transpose(0, 1).split(rows.sizes) for states in (query, key, value))
    apart = []
    for block, *part in zip(rows.blocks, *parts, strict=True):
        padded = (block.pad(states).transpose(1, 2) for states in part)
        apart.append(block.unpad(sdpa_attention_forward(module, *padded, None, **options)[0]))
    return torch.cat(apart).unsqueeze(0), None


def _short_rows(rows: Rows | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Rows | None:
    """The rows where they are short and see themselves alone; None where one is long, or a mask says more."""
    if rows is None:
        if mask is not None or query.shape[2] != key.shape[2]:
            return None
        rows = Rows.of([query.shape[2]] * len(query), query.device)
    short = max(block.width for block in rows.blocks) <= SHORT.get(query.dtype, 0) * query.shape[3]
    return rows if short and query.shape[3] == value.shape[3] else None


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


class _ShortAttention(torch.autograd.Function):
    """Causal attention `[N, heads, D]` of rows that stand one after another, each to itself, block by block.

    key, value: `[N, groups, D]`; the queries of a group of heads share its keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, rows: Rows) -> Tensor:
        (_, heads, width), groups = query.shape, key.shape[1]
        made, kept = query.new_empty(query.shape), []
        parts = zip(rows.blocks, *(part.split(rows.sizes) for part in (query, key, value, made)), strict=True)
        for block, *states, out in parts:
            of_heads, of_groups = block.by_head(heads), block.by_head(groups)
            q = _padded(states[0], of_heads, block).view(block.count * groups, -1, width)
            k, v = (_padded(part, of_groups, block) for part in states[1:])
            unseen = q.new_full((block.width, block.width), -torch.inf).triu_(1).repeat(heads // groups, 1)
            weights = torch.softmax(torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=scale), dim=-1)
            torch.index_select((weights @ v).view(-1, width), 0, of_heads, out=out.view(-1, width))
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.scale, ctx.rows, ctx.shapes = scale, rows, (query.shape, key.shape)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, (query, key), nothing = ctx.saved_tensors, ctx.shapes, gradient.new_zeros(())
        made = [gradient.new_empty(shape) for shape in (query, key, key)]
        kept = [saved[i : i + 4] for i in range(0, len(saved), 4)]
        flat = (part.split(ctx.rows.sizes) for part in (gradient, *made))
        parts = zip(ctx.rows.blocks, kept, *flat, strict=True)
        for block, (q, k, v, weights), outer, *outs in parts:
            of_heads, of_groups = block.by_head(query[1]), block.by_head(key[1])
            outer = _padded(outer, of_heads, block).view(q.shape)
            of_v = weights.transpose(1, 2) @ outer
            of_scores = torch._softmax_backward_data(outer @ v.transpose(1, 2), weights, -1, weights.dtype)
            of_q = torch.baddbmm(nothing, of_scores, k, beta=0, alpha=ctx.scale)
            of_k = torch.baddbmm(nothing, of_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
            for of_state, index, out in zip((of_q, of_k, of_v), (of_heads, of_groups, of_groups), outs, strict=True):
                torch.index_select(of_state.view(-1, query[2]), 0, index, out=out.view(-1, query[2]))
        return *made, None, None


def _padded(flat: Tensor, index: Tensor, block: Block) -> Tensor:
    """`[n, heads, D]` of a block to `[B·heads, T, D]`, with zeros behind the end of each row."""
    heads, width = flat.shape[1:]
    places = block.count * heads * block.width
    room = flat.new_empty(places, width) if block.full else flat.new_zeros(places, width)
    return room.index_copy_(0, index, flat.reshape(-1, width)).view(-1, block.width, width)
