"""Bottleneck adapters: Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", section 2.1."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from policies.schema import PolicySettings


class Bottleneck(nn.Module):
    """A layer and, behind it, for each role: h + up(f(down(h))). `up` starts at zero: it changes nothing at first."""

    def __init__(self, base_layer: nn.Module, width: int, settings: PolicySettings, roles: tuple[str, ...]) -> None:
        """width: of h, what the layer gives."""
        super().__init__()
        self.base_layer = base_layer
        downs = {role: nn.Linear(width, settings.bottleneck) for role in roles}
        ups = {role: nn.Linear(settings.bottleneck, width) for role in roles}
        self.activation = ACT2FN[settings.activation]
        for role in roles:
            downs[role].load_state_dict(downs[roles[0]].state_dict())
            nn.init.zeros_(ups[role].weight)
            nn.init.zeros_(ups[role].bias)
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(downs), nn.ModuleDict(ups)
        self._active_adapter, self._disable_adapters = [roles[0]], False

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """What the layer gives, and the adapter's part in float32 added to it."""
        hidden = self.base_layer(*inputs, **options)
        if self._disable_adapters:
            return hidden
        role = self._active_adapter[0]
        inner = self.activation(self.bottleneck_down[role](hidden.to(torch.float32)))
        return hidden + self.bottleneck_up[role](inner).to(hidden.dtype)
