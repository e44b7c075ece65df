"""Bottleneck adapters: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", section 2.1."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from policies.schema import PolicySettings


class Bottleneck(nn.Module):
    """A layer followed by h + up(f(down(h))) for each role. `up` starts at zero, so that nothing changes at first."""

    def __init__(self, base_layer: nn.Module, width: int, settings: PolicySettings, roles: tuple[str, ...]) -> None:
        """Wrap a layer.

        Args:
            base_layer: The layer of the base model.
            width: The size of its output h.
            settings: The adapter's settings.
            roles: The roles that get an adapter; all start with the same weights.
        """
        super().__init__()
        self.base_layer = base_layer
        downs = {role: nn.Linear(width, settings.bottleneck) for role in roles}
        ups = {role: nn.Linear(settings.bottleneck, width) for role in roles}
        self.activation = ACT2FN[settings.activation]
        for role in roles:
            downs[role].load_state_dict(downs[roles[0]].state_dict())
            nn.init.zeros_(ups[role].weight)
            nn.init.zeros_(ups[role].bias)
        self.bottleneck_down = nn.ModuleDict(downs)
        self.bottleneck_up = nn.ModuleDict(ups)
        self._active_adapter = [roles[0]]
        self._disable_adapters = False

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """The layer's output `[..., width]` plus that of the adapter, which is computed in float32."""
        hidden = self.base_layer(*inputs, **options)  # [..., width]
        if self._disable_adapters:
            return hidden
        role = self._active_adapter[0]
        inner = self.activation(self.bottleneck_down[role](hidden.to(torch.float32)))  # [..., bottleneck]
        return hidden + self.bottleneck_up[role](inner).to(hidden.dtype)  # [..., width]
