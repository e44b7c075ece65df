"""One new token a row through the layers of a Llama, or of a family built like it, on the CPU.

For so few rows, what modules and operations cost is more than the arithmetic. Here all layers are one call.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies.layers import native
from policies.layers.lora import AdaptedLinear
from policies.layers.rms_norm import normed

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of layers that are norm, attention, norm and gated feed-forward part, and nothing else."""


class PlainStack:
    """The layers of a model, for roles whose adapters are merged into copies of the weights.

    Linear maps that are given the same input lie in one weight. What goes from one map to the next is in float32.
    """

    @classmethod
    def fits(cls, base: PreTrainedModel) -> bool:
        """Whether the model is of such layers, in each of which every linear map is adapted, and looks back over all.

        That it computes what the model does is for the caller to check.
        """
        layers = getattr(base.base_model, "layers", ())
        if not layers or any(type(layer).__name__ not in FAMILIES for layer in layers):
            return False
        config = base.config
        plain = config.hidden_act == "silu" and not getattr(config, "sliding_window", None)
        frozen = [weight for name, weight in base.named_parameters() if ".lora_" not in name]
        return plain and all(map(_wholly_adapted, layers)) and native.runs(*frozen)

    def __init__(self, base: PreTrainedModel) -> None:
        self._model: Any = base.base_model
        self._layers = [_Layer(layer) for layer in self._model.layers]
        first = self._model.layers[0]
        attention, maps = first.self_attn, _maps(first)
        heads, groups = (part.base.out_features // attention.head_dim for part in maps[:2])
        self._shape = maps[0].base.in_features, heads, groups, attention.head_dim, maps[6].base.in_features
        self._constants = float(first.input_layernorm.variance_epsilon), float(attention.scaling)

    def make_room(self, role: str) -> None:
        """Have what `AdaptedLinear.merge` writes of a role written side by side where inputs are the same."""
        for layer in self._layers:
            layer.make_room(role)

    def __call__(self, role: str, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states `[B, H]` of new tokens `[B]`, whose keys and values go into the cache.

        positions: `[B, 1]` int64; mask: `[B, S]` int64, 1 where a token may be seen, the new ones last.
        """
        _, _, groups, width, _ = self._shape
        embedded = self._model.embed_tokens(ids)
        angles = [part.contiguous() for part in self._model.rotary_emb(embedded, positions)]
        place = embedded.new_empty(len(ids), groups, 1, width)  # that the kernel writes to
        held = [layer.update(place, place) for layer in cache.layers]
        lies = _how_they_lie([states for pair in held for states in pair], width)
        layers = [own.addresses(role, *pair) for own, pair in zip(self._layers, held, strict=True)]
        x, seen = embedded.float(), mask.contiguous()
        given = torch.tensor(layers), len(layers), len(ids), *self._shape, *angles, *lies, mask.shape[1], seen
        native.call("stack", embedded.dtype, *given, *self._constants, x)
        norm = self._model.norm
        return normed(x.to(embedded.dtype), norm.weight, norm.variance_epsilon)[0]


class _Layer:
    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.maps: list[AdaptedLinear] = _maps(layer)
        biases = [part.base.bias for part in self.maps[:3]]
        bias = None if biases[0] is None else torch.cat(biases)
        norms = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        self.between = [bias, *(norm and norm.weight for norm in norms)]
        self.rooms: dict[str, list[Tensor]] = {}

    def make_room(self, role: str) -> None:
        if role in self.rooms:
            return
        self.rooms[role] = []
        for siblings in (self.maps[:3], self.maps[3:4], self.maps[4:6], self.maps[6:]):
            sizes = [part.base.out_features for part in siblings]
            room = siblings[0].base.weight.new_empty(sum(sizes), siblings[0].base.in_features)
            for part, own in zip(siblings, room.split(sizes), strict=True):
                part.rooms[role] = own
            self.rooms[role].append(room)

    def addresses(self, role: str, keys: Tensor, values: Tensor) -> list[int]:
        """Of all that the kernel wants of a layer, in its order; 0 of what the layer does not have."""
        inward, outward, up, down = self.rooms[role]
        before, after = self.layer.input_layernorm.weight, self.layer.post_attention_layernorm.weight
        of = before, inward, *self.between, outward, after, up, down, keys, values
        return [0 if tensor is None else tensor.data_ptr() for tensor in of]


def _how_they_lie(held: list[Tensor], width: int) -> tuple[int, int]:
    """Between rows, and between groups, of keys and values `[B, groups, S, D]`, which are the same for all layers."""
    lies = {states.stride() for states in held}
    (of_row, of_group, *of_token), *others = lies
    if others or of_token != [width, 1]:
        raise ValueError(f"keys and values of all layers must lie alike, tokens beside each other; these lie by {lies}")
    return of_row, of_group


def _maps(layer: Any) -> list[Any]:
    """What stands in place of the forward passes of a layer's linear maps: q, k, v, o, gate, up and down."""
    attention, fed = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = [*(getattr(attention, name) for name in names), fed.gate_proj, fed.up_proj, fed.down_proj]
    return [part.forward for part in parts]


def _wholly_adapted(layer: Any) -> bool:
    """Whether every linear map is plain LoRA, and none has a bias but those of queries, keys and values."""
    maps = _maps(layer)
    return all(isinstance(part, AdaptedLinear) for part in maps) and all(part.base.bias is None for part in maps[3:])
