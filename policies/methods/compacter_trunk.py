"""The trunk of Compacter."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PREFIX
from policies.layers.bottleneck import Bottleneck
from policies.layers.phm import PhmLinear
from policies.methods.layer_adapter_trunk import LayerAdapterTrunk
from policies.module_names import sublayer_outputs

SLOW = f"{PREFIX}compacter_slow"
"""Name in the file of the factors that all layers share."""


class CompacterTrunk(LayerAdapterTrunk):
    """A trunk with bottlenecks of PHM layers after attention and after the MLP of each decoder layer."""

    def _wrap(self, base: PreTrainedModel) -> Iterable[Bottleneck]:
        count = self.settings.kronecker_terms
        for name, size in (("the hidden size", self.width), ("policy.bottleneck", self.settings.bottleneck)):
            if size % count:
                raise UserError(f"policy.kronecker_terms {count} does not divide {name}, {size}: set a common divisor")
        slow = torch.randn(count, count, count) / count**0.5  # [n, n, n]
        self.slow = nn.ParameterDict({role: nn.Parameter(slow.to(base.device, copy=True)) for role in self.roles})
        for parent, name in sublayer_outputs(base, self.settings.targets):
            layer = self._bottleneck(getattr(parent, name)).to(base.device)
            setattr(parent, name, layer)
            yield layer

    def _bottleneck(self, base_layer: nn.Module) -> Bottleneck:
        """Wrap a layer. Roles start with the same weights, R of `up` at zero: nothing changes at first."""
        hidden = self.settings.bottleneck
        rank = self.settings.kronecker_rank
        downs = {role: PhmLinear(self.width, hidden, self.slow[role], rank) for role in self.roles}
        ups = {role: PhmLinear(hidden, self.width, self.slow[role], rank) for role in self.roles}
        for role in self.roles:
            downs[role].load_state_dict(downs[self.roles[0]].state_dict())
            ups[role].load_state_dict(ups[self.roles[0]].state_dict())
            nn.init.zeros_(ups[role].right)
        return Bottleneck(base_layer, downs, ups, self.settings.activation)

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return {SLOW: self.slow[role], **super().adapter(role)}
