"""Attention layers that compute rotary positions on the CPU in one pass over memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from policies.layers import kernel_calls, native
from policies.layers.replacement import ForwardReplacement

FULL_ATTENTION_CLASSES = (
    "ArceeAttention",
    "GemmaAttention",
    "GraniteAttention",
    "GraniteMoeAttention",
    "LlamaAttention",
    "PhimoeAttention",
    "Qwen2MoeAttention",
)
SLIDING_ATTENTION_CLASSES = (
    "MistralAttention",
    "MixtralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
)
"""Classes of transformers that compute exactly what `RotaryAttentionForward` computes; those in the second tuple pass a
sliding window to the attention function. Other families keep their own forward pass."""


def install_rotary(model: PreTrainedModel) -> None:
    """Replace the forward pass of the attention layers of these classes."""
    for module in model.modules():
        if RotaryAttentionForward.fits(module):
            module.forward = RotaryAttentionForward(module)


class RotaryAttentionForward(ForwardReplacement):
    """Replaces the forward pass of an attention layer: the same numbers, up to the rounding of the rotation."""

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module is an attention layer with this forward pass."""
        return type(module).__name__ in (*FULL_ATTENTION_CLASSES, *SLIDING_ATTENTION_CLASSES)

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.has_norms = hasattr(layer, "q_norm")  # Qwen3: each head of queries and keys is normalised
        self.window: dict[str, int | None] = {}
        if type(layer).__name__ in SLIDING_ATTENTION_CLASSES:
            self.window["sliding_window"] = getattr(layer, "sliding_window", layer.config.sliding_window)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: `[B, T, H]`; position_embeddings: cosines and sines `[B, T, D]`; others as in transformers."""
        layer = self.module
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, layer.head_dim)
        query = layer.q_proj(hidden_states).view(head_shape)  # [B, T, heads, D]
        key = layer.k_proj(hidden_states).view(head_shape)  # [B, T, groups, D]
        value = layer.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # [B, groups, T, D]
        if self.has_norms:
            query = layer.q_norm(query)
            key = layer.k_norm(key)
        cos, sin = position_embeddings
        query, key = apply_rotary(query.transpose(1, 2), key.transpose(1, 2), cos, sin)  # [B, heads or groups, T, D]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer.layer_idx)  # [B, groups, S, D]
        dropout = layer.attention_dropout if layer.training else 0.0
        constants = {"dropout": dropout, "scaling": layer.scaling, **self.window}
        implementation = layer.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, weights = attention(layer, query, key, value, attention_mask, **constants, **options)  # [B, T, heads, D]
        return layer.o_proj(out.reshape(*input_shape, -1).contiguous()), weights  # [B, T, H]


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x · cos + (−x₂, x₁) · sin for both halves x₁, x₂ of each head (Su et al. 2021), of queries and keys.

    query, key: `[B, heads, T, D]`; cos, sin: `[B or 1, T, D]`.
    """
    if query.shape[-1] != cos.shape[-1] or not native.runs(query, key, cos, sin):
        return apply_rotary_pos_emb(query, key, cos, sin)
    batch = len(query)
    cos = cos.expand(batch, -1, -1).contiguous()  # [B, T, D]
    sin = sin.expand(batch, -1, -1).contiguous()  # [B, T, D]
    return _Rotation.apply(query, cos, sin), _Rotation.apply(key, cos, sin)


class _Rotation(torch.autograd.Function):
    """Rotates `[B, heads, T, D]` by angles whose cosines and sines are `[B, T, D]`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(states, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(out_gradient, cos, sin, inverse=True), None, None


def _rotate(states: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    by_token = states.transpose(1, 2).contiguous()  # [B, T, heads, D], as projected: nothing is copied
    return kernel_calls.rotate(by_token, cos, sin, inverse).transpose(1, 2)  # [B, heads, T, D]
