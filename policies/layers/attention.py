"""Attention over packed sequences; on the CPU, kernels for short sequences and for one new token per sequence."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from policies.layers import kernel_calls, native
from policies.layers.kernel_calls import AttentionInputs
from policies.layers.packing import PackedSequences, cu_seqlens_of

ATTENTION_NAME = "align"
"""The name under which this attention is registered with transformers."""
MAX_KERNEL_SIZE = 2**16
"""Tokens of a sequence times head_dim up to which our kernel is faster than torch's, which processes keys in blocks and
is made for long sequences. Torch's also needs keys and values repeated for the query heads of each group."""


def install_attention(model: PreTrainedModel) -> None:
    """Make a model that uses torch's fused attention accept packed sequences, and use our kernels on the CPU."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION_NAME, _attention)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(ATTENTION_NAME)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Outputs `[B, T, heads, D]`, as transformers expects them from an attention function.

    query: `[B, heads, T, D]`; key, value: `[B, groups, S, D]`; the mask is True, or 0, where a key is attended to.
    With `packed` among the options, B is 1, T the tokens of all sequences, each sequence attends to itself alone, and
    the mask is ignored.
    """
    packed: PackedSequences | None = options.pop("packed", None)
    scale = float(options.get("scaling") or query.shape[3] ** -0.5)
    if native.runs(query, key, value) and not options.get("dropout"):
        cu_seqlens = _cu_seqlens_for_kernel(packed, query, key, value, attention_mask)
        if cu_seqlens is not None:
            out = _PackedAttention.apply(_flat(query), _flat(key), _flat(value), cu_seqlens, scale)  # [N, heads, D]
            return out.view(query.transpose(1, 2).shape), None
        mask = None if packed is not None else _new_token_mask(query, key, value, attention_mask)
        if mask is not None:
            new = query.squeeze(2).contiguous()  # [B, heads, D]
            return kernel_calls.attend_new_tokens(new, key, value, mask, scale).unsqueeze(1), None
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _attention_by_blocks(module, (query, key, value), packed, options), None


def _flat(states: Tensor) -> Tensor:
    """`[B, heads, T, D]` as `[B·T, heads, D]`."""
    return states.transpose(1, 2).flatten(0, 1).contiguous()


def _attention_by_blocks(
    module: nn.Module, states: tuple[Tensor, Tensor, Tensor], packed: PackedSequences, options: dict[str, Any]
) -> Tensor:
    """Torch's attention, `[1, N, heads, D]`, over padded blocks of sequences of similar length."""
    query, key, value = (part[0].transpose(0, 1).split(packed.sizes) for part in states)  # [N of a block, heads, D]
    outputs = []
    for block, *flat in zip(packed.blocks, query, key, value, strict=True):
        padded = (block.pad(part).transpose(1, 2) for part in flat)  # [B, heads, T, D]
        out, _ = sdpa_attention_forward(module, *padded, None, **options)  # [B, T, heads, D]
        outputs.append(block.unpad(out))  # [N of the block, heads, D]
    return torch.cat(outputs).unsqueeze(0)  # [1, N, heads, D]


def _cu_seqlens_for_kernel(
    packed: PackedSequences | None, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor | None:
    """`[B + 1]` int64, where each sequence starts; None if one is too long for the kernel, or the mask not causal."""
    batch, _, tokens, head_dim = query.shape
    if value.shape[3] != head_dim:
        return None
    if packed is None and (mask is not None or key.shape[2] != tokens):
        return None
    longest = tokens if packed is None else packed.lengths[-1]
    if longest * head_dim > MAX_KERNEL_SIZE:
        return None
    return cu_seqlens_of([tokens] * batch) if packed is None else packed.cu_seqlens


def _new_token_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """`[B, S]` int64, 1 where the one new token of each sequence attends to a key.

    None where there are several new tokens, gradients flow, or the kernel does not support the mask or the layout.
    """
    contiguous_tokens = key.stride()[2:] == (key.shape[3], 1)
    same_layout = key.shape == value.shape and key.stride() == value.stride()
    if query.shape[2] != 1 or not (contiguous_tokens and same_layout) or torch.is_grad_enabled():
        return None
    batch, _, tokens, _ = key.shape
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.long)
    if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
        return None
    return mask[:, 0, 0, :tokens].expand(batch, -1).long()  # [B, S]


class _PackedAttention(torch.autograd.Function):
    """Causal attention over packed sequences; the inputs are those of `AttentionInputs`.

    For the backward pass it saves one number per token and head, from which the attention weights are recomputed
    (Dao et al. 2022, appendix B).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
        inputs = AttentionInputs(query=query, key=key, value=value, cu_seqlens=cu_seqlens, scale=scale)
        out, normalisers = kernel_calls.attention(inputs)
        ctx.save_for_backward(query, key, value, cu_seqlens, out, normalisers)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cu_seqlens, out, normalisers = ctx.saved_tensors
        inputs = AttentionInputs(query=query, key=key, value=value, cu_seqlens=cu_seqlens, scale=ctx.scale)
        gradients = kernel_calls.attention_backward(inputs, out, normalisers, out_gradient.contiguous())
        return *gradients, None, None
