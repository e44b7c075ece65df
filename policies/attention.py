"""Attention to rows without padding; on the CPU, of one new token a row, and of short rows while gradients flow."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from policies.packing import Rows

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
    if rows is not None:
        flat = (states[0].transpose(0, 1).split(rows.sizes) for states in (query, key, value))
        made = []
        for block, parts in zip(rows.blocks, zip(*flat, strict=True), strict=True):
            q, k, v = (block.pad(part).transpose(1, 2) for part in parts)
            made.append(block.unpad(_attention(module, q, k, v, None, **options)[0]))
        return torch.cat(made).unsqueeze(0), None
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    new, scale = query.shape[2], options.get("scaling") or query.shape[3] ** -0.5
    if new == 1 and not torch.is_grad_enabled():
        return _decoding(query, key, value, attention_mask, scale), None
    short = new == key.shape[2] <= SHORT.get(query.dtype, 0) * query.shape[3] and query.shape[3] == value.shape[3]
    plain = attention_mask is None and not options.get("dropout")
    if short and plain and torch.is_grad_enabled():
        dtype = torch.float32 if query.dtype == torch.bfloat16 and query.shape[3] < WIDE else query.dtype
        made = _ShortAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), scale)
        return made.to(query.dtype), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


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
    """Causal attention `[B, T, heads, D]` of rows without a mask. The queries of a group of heads share its keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, length, width = query.shape
        groups = key.shape[1]
        q = query.reshape(rows * groups, -1, width)
        k, v = (states.reshape(rows * groups, length, width) for states in (key, value))
        unseen = q.new_full((length, length), -torch.inf).triu_(1).repeat(heads // groups, 1)
        weights = torch.softmax(torch.baddbmm(unseen, q, k.transpose(1, 2), alpha=scale), dim=-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.shape = scale, (rows, heads, groups, length, width)
        return (weights @ v).view(rows, heads, length, width).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        rows, heads, groups, length, width = ctx.shape
        outer = gradient.transpose(1, 2).reshape(rows * groups, -1, width)
        of_v = weights.transpose(1, 2) @ outer
        of_weights = outer @ v.transpose(1, 2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_q, of_k = of_scores @ k, of_scores.transpose(1, 2) @ q
        split = (rows, groups, length, width)
        return of_q.view(rows, heads, length, width), of_k.view(split), of_v.view(split), None
