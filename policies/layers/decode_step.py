"""One new token per sequence through all layers of a Llama, or of a similar model, on the CPU.

For so few tokens, calling modules and operations costs more than the arithmetic. Here one call computes all layers.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies.layers import kernel_calls, native
from policies.layers.kernel_calls import StackSizes
from policies.layers.lora import LoraForward

DECODER_LAYER_CLASSES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of transformers that are norm, attention, norm and SwiGLU MLP, and nothing else."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


class DecodeStep:
    """The layers of a model, for roles whose adapters are merged into copies of the weights.

    The weights of linear layers with the same input are stacked in one buffer. Activations are float32 between layers.
    """

    @classmethod
    def fits(cls, base: PreTrainedModel) -> bool:
        """Whether all layers are of these classes, with LoRA on all their linear layers and no sliding window.

        The caller must check that the results agree with the model's.
        """
        layers = getattr(base.base_model, "layers", ())
        if not layers or any(type(layer).__name__ not in DECODER_LAYER_CLASSES for layer in layers):
            return False
        config = base.config
        if config.hidden_act != "silu" or getattr(config, "sliding_window", None):
            return False
        frozen = [weight for name, weight in base.named_parameters() if ".lora_" not in name]
        return all(map(_has_lora_everywhere, layers)) and native.runs(*frozen)

    def __init__(self, base: PreTrainedModel) -> None:
        self._model: Any = base.base_model
        self._layers = [_Layer(layer) for layer in self._model.layers]
        first = self._model.layers[0]
        attention = first.self_attn
        query, key, *_, down = _linear_layers(first)
        self._sizes = StackSizes(
            hidden=query.base.in_features,
            heads=query.base.out_features // attention.head_dim,
            groups=key.base.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            inner=down.base.in_features,
            epsilon=float(first.input_layernorm.variance_epsilon),
            scale=float(attention.scaling),
        )

    def allocate(self, role: str) -> None:
        """Make `LoraForward.merge` write the weights of a role to this object's buffers."""
        for layer in self._layers:
            layer.allocate(role)

    def __call__(self, role: str, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states `[B, H]` of new tokens `[B]`, which are appended to the KV cache.

        positions: `[B, 1]` int64; mask: `[B, S]` int64, 1 where a token is attended to, the new ones last.
        """
        sizes = self._sizes
        embedded = self._model.embed_tokens(ids)  # [B, H]
        cos, sin = self._model.rotary_emb(embedded, positions)  # [B, 1, D]
        new = embedded.new_empty(len(ids), sizes.groups, 1, sizes.head_dim)  # the kernel writes the new KV states
        cached = [layer.update(new, new) for layer in cache.layers]  # keys and values [B, groups, S, D] of each layer
        addresses = [layer.addresses(role, *pair) for layer, pair in zip(self._layers, cached, strict=True)]
        x = embedded.float()
        kernel_calls.decode_layers(
            addresses=torch.tensor(addresses),
            sizes=sizes,
            angles=(cos.contiguous(), sin.contiguous()),
            cache_strides=_cache_strides(cached, sizes.head_dim),
            mask=mask.contiguous(),
            x=x,
        )
        norm = self._model.norm
        return kernel_calls.rms_norm(x.to(embedded.dtype), norm.weight, float(norm.variance_epsilon))[0]


class _Layer:
    """One layer: its linear layers, and the buffers of their merged weights for each role."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.linear_layers = _linear_layers(layer)
        biases = [linear.base.bias for linear in self.linear_layers[:3]]
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]  # Qwen3
        self.bias = None if biases[0] is None else torch.cat(biases)  # [(heads + 2 · groups) · D]
        self.head_norms = [None if norm is None else norm.weight for norm in norms]  # [D] each, or None
        self.buffers: dict[str, list[Tensor]] = {}

    def allocate(self, role: str) -> None:
        if role in self.buffers:
            return
        self.buffers[role] = []
        query_key_value, output = self.linear_layers[:3], self.linear_layers[3:4]
        gate_up, down = self.linear_layers[4:6], self.linear_layers[6:]
        for siblings in (query_key_value, output, gate_up, down):
            sizes = [linear.base.out_features for linear in siblings]
            buffer = siblings[0].base.weight.new_empty(sum(sizes), siblings[0].base.in_features)  # [sum of outs, in]
            for linear, part in zip(siblings, buffer.split(sizes), strict=True):
                linear.buffers[role] = part
            self.buffers[role].append(buffer)

    def addresses(self, role: str, keys: Tensor, values: Tensor) -> list[int]:
        """The addresses of the tensors in the kernel's struct `Layer`, in its order; 0 for those that a layer lacks."""
        query_key_value, output, gate_up, down = self.buffers[role]
        attention = self.layer.input_layernorm.weight, query_key_value, self.bias, *self.head_norms, output
        mlp = self.layer.post_attention_layernorm.weight, gate_up, down
        return [0 if tensor is None else tensor.data_ptr() for tensor in (*attention, *mlp, keys, values)]


def _cache_strides(cached: list[tuple[Tensor, Tensor]], head_dim: int) -> tuple[int, int]:
    """Strides between sequences and between groups of `[B, groups, S, D]`, which are the same for all layers."""
    strides = set()
    for keys, values in cached:
        strides |= {keys.stride(), values.stride()}
    (sequence_stride, group_stride, *token_strides), *others = strides
    if others or token_strides != [head_dim, 1]:
        raise ValueError(f"the KV caches of all layers must have equal strides, contiguous per group; found {strides}")
    return sequence_stride, group_stride


def _linear_layers(layer: Any) -> list[Any]:
    """The forward passes, `LoraForward` where they are replaced, of a layer's q, k, v, o, gate, up and down."""
    attention = [getattr(layer.self_attn, name) for name in PROJECTIONS]
    mlp = [getattr(layer.mlp, name) for name in MLP_LAYERS]
    return [linear.forward for linear in (*attention, *mlp)]


def _has_lora_everywhere(layer: Any) -> bool:
    """Whether every linear layer has plain LoRA, and only those of queries, keys and values may have a bias."""
    linear_layers = _linear_layers(layer)
    if not all(isinstance(linear, LoraForward) for linear in linear_layers):
        return False
    return all(linear.base.bias is None for linear in linear_layers[3:])
