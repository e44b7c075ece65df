"""Adapters inside the base's layers: PEFT's LoRA and (IA)³, and bottleneck adapters."""

from collections.abc import Iterable, Mapping

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policies.adapters import PREFIX, peft_config
from policies.bottleneck import Bottleneck
from policies.errors import UserError
from policies.initial import hold_principal, write_loftq, write_pissa
from policies.lora import AdaptedLinear
from policies.places import outputs_of_sublayers
from policies.quantised import dequantise, is_packed
from policies.trunk import Trunk


class TunedTrunk(Trunk):
    """A trunk whose layers hold an adapter for each role, and use that of one role at a time."""

    def _build(self, base: PreTrainedModel) -> None:
        self._layers: list[BaseTunerLayer | Bottleneck] = list(self._wrap(base))
        self._adapted = [AdaptedLinear(layer) for layer in self._layers if AdaptedLinear.fits(layer)]
        for adapted in self._adapted:
            adapted.layer.forward = adapted
        if self.settings.init == "pissa":
            hold_principal(self._layers, self.settings.rank)

    def _wrap(self, base: PreTrainedModel) -> Iterable[BaseTunerLayer]:
        config = peft_config(self.settings, base)
        try:
            model = get_peft_model(base, config, adapter_name=self.roles[0])
            for role in self.roles[1:]:
                model.add_adapter(role, config)
        except ValueError as error:
            raise UserError(f"policy.targets: {error}") from error
        return (module for module in model.modules() if isinstance(module, BaseTunerLayer))

    def initialise(self, *roles: str) -> None:
        layers = {n: m for n, m in self.causal.named_modules() if isinstance(m, LoraLayer)}
        if roles and self.settings.init == "pissa":
            write_pissa(layers.values(), roles, self.settings.rank)
        if roles and self.settings.init == "loftq":
            write_loftq(layers, roles, self.settings.rank, self.base)

    def switch(self, role: str) -> None:
        """Make the next forward passes those of a role.

        Sets the layers' active adapter and leaves `requires_grad` alone: peft's own `set_adapter` would turn the
        other adapters' gradients off, which DeepSpeed does not expect.
        """
        self._role = role
        adapted = role in self.roles
        for layer in self._layers:
            layer._disable_adapters = not adapted
            if adapted:
                layer._active_adapter = [role]

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live parameters of a role's adapter by their name in a PEFT file."""
        named = ((name.split("."), parameter) for name, parameter in self.causal.named_parameters())
        return {_in_file(parts, role): parameter for parts, parameter in named if role in parts}

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        super().write_adapter(role, weights)
        for adapted in self._adapted:
            adapted.merged.pop(role, None)

    def merge(self, role: str) -> None:
        """From now on, a role's passes use weights with its adapter, as it now is, in them: faster, and no gradient.

        It costs the memory of the adapted weights once more. Layers that LoRA does not adapt plainly stay as they are.
        """
        for adapted in self._adapted:
            adapted.merge(role)

    def merged_numbers(self) -> int:
        return sum(adapted.base.weight.numel() for adapted in self._adapted)

    @torch.no_grad()
    def merged_weights(self, role: str) -> dict[str, Tensor]:
        self.switch(role)
        return {
            f"{name}.weight": _whole_weight(layer)
            for name, layer in self.causal.named_modules()
            if isinstance(layer, BaseTunerLayer) or is_packed(layer)
        }

    def leave_to_modules(self) -> None:
        """Use PEFT's own forward passes, which call the layers' parts as modules."""
        for adapted in self._adapted:
            del adapted.layer.forward
        self._adapted = []


class BottleneckTrunk(TunedTrunk):
    """A trunk with bottleneck adapters behind its sublayers."""

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        return Trunk.merged_weights(self, role)

    def _wrap(self, base: PreTrainedModel) -> Iterable[Bottleneck]:
        for parent, name in outputs_of_sublayers(base, self.settings.targets):
            layer = Bottleneck(getattr(parent, name), self.width, self.settings, self.roles)
            setattr(parent, name, layer.to(base.device))
            yield layer


def _whole_weight(layer: nn.Module) -> Tensor:
    """The weight of the linear map that a layer is, its adapter in it, as a plain layer in its place holds it."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if layer is base:
        return dequantise(layer)
    rows = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
    device = next(layer.parameters()).device
    inputs = torch.cat([torch.eye(rows, device=device), torch.zeros(1, rows, device=device)])
    outputs = layer(inputs).float()
    weight = outputs[:-1] - outputs[-1]
    return weight if isinstance(base, Conv1D) else weight.T.contiguous()


def _in_file(parts: list[str], role: str) -> str:
    """A parameter's name in PEFT's layout: without the role, and DoRA's magnitudes without `weight`."""
    name = PREFIX + ".".join(part for part in parts if part != role)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
