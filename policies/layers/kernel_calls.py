"""One typed function for each compiled kernel. Callers check `native.runs` first; the sources are in `kernels/`.

Inputs are contiguous tensors of one dtype, float32 or bfloat16, unless a docstring says otherwise. The kernels compute
in float32. Each result row depends neither on the other rows nor on the number of threads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from policies.layers import native


class AttentionInputs(NamedTuple):
    """Inputs of causal attention over packed sequences, each of which attends to itself alone.

    query: `[N, heads, D]`; key, value: `[N, groups, D]`, each group shared by heads / groups query heads.
    cu_seqlens: `[B + 1]` int64, where each sequence starts, and where the last one ends. scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens: Tensor
    scale: float

    def leading_arguments(self) -> tuple[Tensor | int | float, ...]:
        """The first arguments of both the forward and the backward kernel."""
        _, heads, head_dim = self.query.shape
        sequences = len(self.cu_seqlens) - 1
        groups = self.key.shape[1]
        states = self.query, self.key, self.value
        return *states, self.cu_seqlens, sequences, heads, groups, head_dim, self.scale


def attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Outputs `[N, heads, D]`, and the log-sum-exp of the scores `[N, heads]` float32 for the backward pass."""
    out = torch.empty_like(inputs.query)
    normalisers = inputs.query.new_empty(inputs.query.shape[:2], dtype=torch.float32)
    native.call("attention", out.dtype, (*inputs.leading_arguments(), out, normalisers))
    return out, normalisers


def attention_backward(
    inputs: AttentionInputs, out: Tensor, normalisers: Tensor, out_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from both results of `attention` and the gradient of the outputs."""
    query_gradient = torch.empty_like(inputs.query)
    key_gradient = torch.empty_like(inputs.key)
    value_gradient = torch.empty_like(inputs.value)
    gradients = query_gradient, key_gradient, value_gradient
    native.call(
        "attention_backward", out.dtype, (*inputs.leading_arguments(), out, normalisers, out_gradient, *gradients)
    )
    return gradients


def attend_new_tokens(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention `[B, heads, D]` of one new token per sequence to the KV cache.

    query: `[B, heads, D]`, of any stride between sequences; key, value: `[B, groups, S, D]`, of equal strides, any
    between sequences and groups; mask: `[B, S]` int64, 0 where a token is not attended to.
    """
    batch, heads, head_dim = query.shape
    groups, tokens = key.shape[1:3]
    out = query.new_empty(query.shape)
    # Addresses instead of tensors: the strides, which follow, say how the states lie in memory.
    states = query.data_ptr(), query.stride(0), key.data_ptr(), value.data_ptr(), key.stride(0), key.stride(1)
    native.call("attend_new_tokens", query.dtype, (*states, mask, batch, heads, groups, head_dim, tokens, scale, out))
    return out


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """weight · x / √(mean x² + ε) (Zhang and Sennrich 2019) of `[..., H]`, and 1 / √(…) `[...]` float32."""
    out = torch.empty_like(x)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    native.call("rms_norm", x.dtype, (x, weight, out, scales, scales.numel(), x.shape[-1], epsilon))
    return out, scales


def rms_norm_backward(x: Tensor, weight: Tensor, scales: Tensor, out_gradient: Tensor) -> Tensor:
    """The gradient `[..., H]` of x; scales: the second result of `rms_norm`."""
    x_gradient = torch.empty_like(x)
    native.call(
        "rms_norm_backward", x.dtype, (x, weight, scales, out_gradient, x_gradient, scales.numel(), x.shape[-1])
    )
    return x_gradient


def rotate(states: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Queries or keys `[B, T, heads, D]` rotated by their positions (Su et al. 2021); cos, sin: `[B, T, D]`.

    inverse: rotate back by the same angles, which is the gradient.
    """
    out = torch.empty_like(states)
    batch, tokens, heads, head_dim = states.shape
    native.call("rotate", states.dtype, (states, cos, sin, out, batch * tokens, heads, head_dim, int(inverse)))
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020), all `[..., inner]`."""
    out = torch.empty_like(gate)
    width = gate.shape[-1]
    native.call("swiglu", gate.dtype, (gate, up, out, gate.numel() // width, width))
    return out


def swiglu_backward(gate: Tensor, up: Tensor, out_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients `[..., inner]` of gate and up."""
    gate_gradient = torch.empty_like(gate)
    up_gradient = torch.empty_like(up)
    width = gate.shape[-1]
    tensors = gate, up, out_gradient, gate_gradient, up_gradient
    native.call("swiglu_backward", gate.dtype, (*tensors, gate.numel() // width, width))
    return gate_gradient, up_gradient


def logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of tokens and entropies, both `[P]` float32, under softmax(logits / temperature).

    logits: `[P, V]`; tokens: `[P]` int64, all in the vocabulary: the kernel does not check. with_gradient: also
    softmax − 1[token], `[P, V]` in the dtype of the logits: −temperature · ∂ log p(token) / ∂ logits.
    """
    positions, vocabulary = logits.shape
    chosen, entropies = logits.new_empty(2, positions, dtype=torch.float32)
    gradient = torch.empty_like(logits) if with_gradient else None
    sizes = positions, vocabulary, float(temperature)
    results = chosen, entropies, 0 if gradient is None else gradient  # 0: the null pointer
    native.call("logprobs", logits.dtype, (logits, tokens, *sizes, *results))
    return chosen, entropies, gradient


class StackSizes(NamedTuple):
    """Sizes and constants that all layers of a model share."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    epsilon: float
    """Of the RMS norms."""
    scale: float
    """Of the attention scores."""


def decode_layers(
    addresses: Tensor,
    sizes: StackSizes,
    angles: tuple[Tensor, Tensor],
    cache_strides: tuple[int, int],
    mask: Tensor,
    x: Tensor,
) -> None:
    """One new token per sequence through all layers of a Llama; x, `[B, H]` float32, is updated in place.

    addresses: `[layers, 11]` int64, of each layer's tensors in the order of `Layer` in `kernels/decoding.h`, 0 for
    those that it lacks; the kernel writes the new keys and values to the last position of the KV cache. angles:
    cosines and sines, `[B, D]`, in the dtype of the weights. cache_strides: between sequences and between groups of
    the cache. mask: `[B, S]` int64, 0 where a token is not attended to, the new ones last.
    """
    cos, sin = angles
    *shape, epsilon, scale = sizes
    batch, tokens = mask.shape
    arguments = (addresses, len(addresses), batch, *shape, cos, sin, *cache_strides, tokens, mask, epsilon, scale, x)
    native.call("decode_layers", cos.dtype, arguments)
