"""The trunk of (IA)³: PEFT's layers with learned scales."""

from collections.abc import Mapping, Sequence

from peft import IA3Config
from torch import Tensor
from transformers import PreTrainedModel

from policies.files.adapters import adapted_modules
from policies.methods.layer_adapter_trunk import PeftTrunk
from policies.module_names import FEEDFORWARD_OUTPUTS, find_targets, ia3_layers, linears, names_ending_in
from policies.schema import PolicySettings


class Ia3Trunk(PeftTrunk):
    """A trunk with scales of the outputs of key and value projections, and of the inputs of the MLP's last layer."""

    def _peft_config(self, base: PreTrainedModel) -> IA3Config:
        targets, feedforward = ia3_layers(base)
        if self.settings.targets is not None:
            targets = find_targets(linears(base), self.settings.target_names, base)
            feedforward = names_ending_in(targets, FEEDFORWARD_OUTPUTS)
        return _ia3_config(targets, feedforward, base.config.name_or_path)


def saved_ia3_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> IA3Config:
    """PEFT's description of a saved adapter, whose weights say which layers it scales."""
    targets = adapted_modules(weights)
    return _ia3_config(targets, names_ending_in(targets, FEEDFORWARD_OUTPUTS), base)


def _ia3_config(targets: Sequence[str], feedforward: Sequence[str], base: str) -> IA3Config:
    return IA3Config(
        target_modules=targets, feedforward_modules=feedforward, base_model_name_or_path=base, task_type="CAUSAL_LM"
    )
