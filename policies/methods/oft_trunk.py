"""The trunk of OFT: PEFT's layers, with exact rotations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft import OFTConfig
from torch import Tensor

from policies.errors import UserError
from policies.files.adapters import adapted_modules
from policies.methods.linear_adapter_trunk import LinearAdapterTrunk
from policies.schema import PolicySettings


class OftTrunk(LinearAdapterTrunk):
    """A trunk that rotates the inputs of linear layers, block by block."""

    def _check_layers(self, layers: Mapping[str, Any]) -> None:
        super()._check_layers(layers)
        size = self.settings.block_size
        for name, layer in layers.items():
            if layer.in_features % size:
                common = math.gcd(*(other.in_features for other in layers.values()))
                raise UserError(
                    f"policy.block_size {size} does not divide the {layer.in_features} inputs of {name}: set a divisor "
                    f"of {common}, or other policy.targets"
                )

    @staticmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> OFTConfig:
        return OFTConfig(
            oft_block_size=settings.block_size,
            use_cayley_neumann=False,  # the truncated series is no rotation
            target_modules=list(targets),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )


def saved_oft_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> OFTConfig:
    """PEFT's description of a saved adapter, whose weights say which layers it adapts."""
    targets = [name.removesuffix(".oft_R") for name in adapted_modules(weights)]
    return OftTrunk._describe(settings, targets, base)
