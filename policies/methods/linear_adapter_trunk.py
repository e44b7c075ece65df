"""The base class of trunks with one of PEFT's adapters on linear layers: all of them, or those that are named."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.methods.layer_adapter_trunk import PeftTrunk
from policies.module_names import find_targets, linears
from policies.schema import PolicySettings


class LinearAdapterTrunk(PeftTrunk):
    """A trunk with an adapter on the linear layers that `policy.targets` names, or on all."""

    adapts_conv1d = False
    """Whether PEFT adapts the linear layers of GPT-2, whose weights are transposed."""

    def _peft_config(self, base: PreTrainedModel) -> PeftConfig:
        layers = linears(base)
        if self.settings.targets:
            targets = find_targets(layers, self.settings.target_names, base)
            layers = {name: layers[name] for name in targets}
        self._check_layers(layers)
        return self._describe(self.settings, list(layers), base.config.name_or_path)

    def _check_layers(self, layers: Mapping[str, Any]) -> None:
        """Raise UserError where a layer cannot be adapted as the settings say; `layers` are by name in the base."""
        for name, layer in layers.items():
            if not self.adapts_conv1d and not isinstance(layer, nn.Linear):
                raise UserError(
                    f"policy.method {self.settings.method}: {name} is a {type(layer).__name__}, which PEFT does not "
                    "adapt by this method: use lora"
                )

    @staticmethod
    @abstractmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> PeftConfig:
        """PEFT's description of the adapter.

        Args:
            settings: The adapter's settings.
            targets: Names of the adapted layers in the base.
            base: Folder or hub name of the base model.
        """
