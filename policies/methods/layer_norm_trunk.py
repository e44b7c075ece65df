"""The trunk of LayerNorm tuning: each role has its own gains and biases of the norms."""

from collections.abc import Iterator, Mapping

from peft import LNTuningConfig
from torch import Tensor
from transformers import PreTrainedModel

from policies.files.adapters import adapted_modules
from policies.methods.partial_trunk import PartialTrunk, Slot, slots_of
from policies.module_names import norms
from policies.schema import PolicySettings

PEFT_LAYER = ".ln_tuning_layers"
"""What PEFT appends to the name of a norm that it tunes."""


class LayerNormTrunk(PartialTrunk):
    """A trunk in which each role has its own parameters of the norms, named as in PEFT."""

    def _select(self, base: PreTrainedModel) -> Iterator[Slot]:
        for name, module in norms(base).items():
            yield from slots_of(name, module, layer=PEFT_LAYER)


def saved_layer_norm_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> LNTuningConfig:
    """PEFT's description of a saved adapter, whose weights say which norms it tunes."""
    modules = [name.removesuffix(PEFT_LAYER) for name in adapted_modules(weights)]
    return LNTuningConfig(target_modules=modules, base_model_name_or_path=base, task_type="CAUSAL_LM")
