"""The base classes of trunks with adapters in the base's layers: this library's layers, or PEFT's."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policies.errors import UserError
from policies.files.adapters import PREFIX
from policies.files.quantization import is_packed
from policies.module_names import TRAIN_OUTSIDE, find_targets, linears, names_ending_in
from policies.trunk import Trunk


class LayerAdapterTrunk(Trunk):
    """A trunk whose layers hold an adapter for each role and use one at a time."""

    def _build(self, base: PreTrainedModel) -> None:
        self._layers: list[Any] = list(self._wrap(base))

    @abstractmethod
    def _wrap(self, base: PreTrainedModel) -> Iterable[nn.Module]:
        """Put the adapters of all roles into the base, and return the layers that hold them."""

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
        """The live parameters of a role's adapter by their names in a PEFT file."""
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.causal.named_parameters():
            parts = name.split(".")
            if role in parts:
                parameters[_name_in_file(parts, role)] = parameter
        return parameters


class PeftTrunk(LayerAdapterTrunk):
    """A trunk whose adapted layers are PEFT's."""

    @abstractmethod
    def _peft_config(self, base: PreTrainedModel) -> PeftConfig:
        """PEFT's description of the adapter for this model."""

    def _wrap(self, base: PreTrainedModel) -> Iterable[BaseTunerLayer]:
        config = self._peft_config(base)
        try:
            model = get_peft_model(base, config, adapter_name=self.roles[0])
            for role in self.roles[1:]:
                model.add_adapter(role, config)
        except ValueError as error:
            raise UserError(f"policy.targets: {error}") from error
        _refuse_embeddings(base)
        _check_all_targets_found(base, model.peft_config[self.roles[0]].target_modules)
        return (module for module in model.modules() if isinstance(module, BaseTunerLayer))

    @torch.no_grad()
    def merged_weights(self, role: str) -> dict[str, Tensor]:
        self.switch(role)
        weights: dict[str, Tensor] = {}
        for name, layer in list(self.causal.named_modules()):
            is_adapted = isinstance(layer, BaseTunerLayer)
            if is_packed(layer.get_base_layer() if is_adapted else layer):
                weights.setdefault(f"{name.removesuffix('.base_layer')}.weight", _unpacked_weight(layer))
            elif is_adapted:
                layer.merge(adapter_names=[role])
        for name, parameter in self.causal.named_parameters():
            if not set(name.split(".")) & {*self.roles}:
                weights.setdefault(name.replace(".base_layer", ""), parameter.detach())
        return weights


def _refuse_embeddings(base: PreTrainedModel) -> None:
    """Raise UserError where the LM head, or an embedding, got an adapter."""
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and (module is head or isinstance(module.get_base_layer(), nn.Embedding)):
            raise UserError(f"policy.targets: {name} is not in a decoder layer and cannot be adapted. {TRAIN_OUTSIDE}")


def _check_all_targets_found(base: PreTrainedModel, targets: str | Iterable[str] | None) -> None:
    """Raise UserError where a name found no layer; PEFT only reports it if none of the names did.

    targets: Names, or a pattern, without those that PEFT translates to stacked weights, such as the experts'.
    """
    if isinstance(targets, str) or not targets:
        return
    adapted = [name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    layers = [name.removesuffix(".base_layer") for name in linears(base) if ".lora_" not in name]
    for target in targets:
        if not names_ending_in(adapted, [target]):
            find_targets(layers, [target], base)


def _unpacked_weight(layer: nn.Module) -> Tensor:
    """The weight that a four-bit linear layer multiplies by, its adapter included, laid out as in the original layer.

    It is read off the layer's outputs for the unit vectors, from which the output for zero takes the bias.
    """
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    inputs = torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)])  # [in + 1, in]
    outputs = layer(inputs.to(base.weight.device)).float()  # [in + 1, out]
    weight = outputs[:-1] - outputs[-1]  # [in, out]
    return weight if getattr(base, "source_cls", None) is Conv1D else weight.T.contiguous()


def _name_in_file(parts: list[str], role: str) -> str:
    """A parameter's name in PEFT's layout: without the role, and DoRA's magnitudes without `weight`."""
    name = PREFIX + ".".join(part for part in parts if part != role)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
