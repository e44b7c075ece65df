"""One new token a row through the layers of a Llama, or of a family built like it, on the CPU.

For so few rows, what modules cost is more than the arithmetic. Here a layer is some fifteen operations.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from policies import native
from policies.attention import attend_new
from policies.gated import gated
from policies.lora import AdaptedLinear
from policies.norms import normed
from policies.rotation import rotated

FAMILIES = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Classes of layers that are norm, attention, norm and gated feed-forward part, and nothing else."""


class PlainStack:
    """The layers of a model, for roles whose adapters are merged into copies of the weights.

    Linear maps that are given the same input lie in one weight, so that there is one product in place of two or three.
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

    def make_room(self, role: str) -> None:
        """Have what `AdaptedLinear.merge` writes of a role written side by side where inputs are the same."""
        for layer in self._layers:
            layer.make_room(role)

    def __call__(self, role: str, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Last hidden states `[B, H]` of new tokens `[B]`, whose keys and values go into the cache.

        positions: `[B, 1]` int64; mask: `[B, S]`, 1 where a token may be seen, the new ones last.
        """
        x = self._model.embed_tokens(ids)
        angles = self._model.rotary_emb(x, positions)
        seen = mask.contiguous()
        for layer, held in zip(self._layers, cache.layers, strict=True):
            x = layer(role, x, angles, seen, held)
        return _normed(x, self._model.norm)


class _Layer:
    def __init__(self, layer: Any) -> None:
        self.layer, attention = layer, layer.self_attn
        self.width, self.scale = attention.head_dim, float(attention.scaling)
        self.norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.maps: list[AdaptedLinear] = _maps(layer)
        heads = [part.base.out_features // self.width for part in self.maps[:3]]
        self.heads, self.groups = heads[0], heads[1]
        biases = [part.base.bias for part in self.maps[:3]]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.weights: dict[str, tuple[Tensor, ...]] = {}

    def make_room(self, role: str) -> None:
        if role in self.weights:
            return
        rooms = []
        for siblings in (self.maps[:3], self.maps[3:4], self.maps[4:6], self.maps[6:]):
            sizes = [part.base.out_features for part in siblings]
            room = siblings[0].base.weight.new_empty(siblings[0].base.in_features, sum(sizes))
            for part, own in zip(siblings, room.split(sizes, dim=1), strict=True):
                part.rooms[role] = own
            rooms.append(room)
        self.weights[role] = tuple(rooms)

    def __call__(self, role: str, x: Tensor, angles: tuple[Tensor, Tensor], seen: Tensor, held: DynamicLayer) -> Tensor:
        inward, outward, up, down = self.weights[role]
        states = _normed(x, self.layer.input_layernorm) @ inward
        if self.bias is not None:
            states += self.bias
        attended = self._attend(states.view(len(x), -1, self.width), angles, seen, held)
        x = torch.addmm(x, attended.view(len(x), -1), outward)
        gate, value = (_normed(x, self.layer.post_attention_layernorm) @ up).chunk(2, dim=-1)
        return torch.addmm(x, gated(gate, value), down)

    def _attend(self, states: Tensor, angles: tuple[Tensor, Tensor], seen: Tensor, held: DynamicLayer) -> Tensor:
        """`[B, heads, D]` from queries, keys and values beside each other `[B, heads + 2·groups, D]`."""
        both, value = states.split([self.heads + self.groups, self.groups], dim=1)
        if self.norms[0] is not None:
            parts = both.split([self.heads, self.groups], dim=1)
            both = torch.cat([_normed(part, norm) for part, norm in zip(parts, self.norms, strict=True)], dim=1)
        query, key = rotated(both, *angles).split([self.heads, self.groups], dim=1)
        keys, values = held.update(key.unsqueeze(2), value.unsqueeze(2))
        return attend_new(query, keys, values, seen, self.scale)


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


def _normed(x: Tensor, norm: Any) -> Tensor:
    return normed(x.contiguous(), norm.weight, norm.variance_epsilon)[0]
