"""Bottleneck adapters: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", section 2.1."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class Bottleneck(nn.Module):
    """A layer followed by h + up(f(down(h))) for each role."""

    def __init__(
        self, base_layer: nn.Module, downs: Mapping[str, nn.Module], ups: Mapping[str, nn.Module], activation: str
    ) -> None:
        """Wrap a layer.

        Args:
            base_layer: The layer of the base model.
            downs: By role, the map from the layer's output h to the hidden units of the adapter.
            ups: By role, the map from the hidden units to the change of h.
            activation: Name of the non-linearity f.
        """
        super().__init__()
        self.base_layer = base_layer
        self.activation = ACT2FN[activation]
        self.bottleneck_down = nn.ModuleDict(dict(downs))
        self.bottleneck_up = nn.ModuleDict(dict(ups))
        self._active_adapter = [next(iter(downs))]
        self._disable_adapters = False

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The layer's output `[..., width]` plus that of the adapter, which is computed in float32."""
        hidden = self.base_layer(*inputs, **options)  # [..., width]
        if self._disable_adapters:
            return hidden
        role = self._active_adapter[0]
        inner = self.activation(self.bottleneck_down[role](hidden.to(torch.float32)))  # [..., bottleneck]
        return hidden + self.bottleneck_up[role](inner).to(hidden.dtype)  # [..., width]


def dense_bottleneck(
    base_layer: nn.Module, width: int, hidden: int, activation: str, roles: Sequence[str]
) -> Bottleneck:
    """A bottleneck of two linear layers. Roles start with the same weights, `up` at zero: nothing changes at first.

    Args:
        base_layer: The layer of the base model.
        width: The size of its output.
        hidden: Hidden units of the adapter.
        activation: Name of the non-linearity.
        roles: The roles that get an adapter.
    """
    downs = {role: nn.Linear(width, hidden) for role in roles}
    ups = {role: nn.Linear(hidden, width) for role in roles}
    for role in roles:
        downs[role].load_state_dict(downs[roles[0]].state_dict())
        nn.init.zeros_(ups[role].weight)
        nn.init.zeros_(ups[role].bias)
    return Bottleneck(base_layer, downs, ups, activation)
