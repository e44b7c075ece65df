"""The trunk of LoHa: PEFT's layers."""

from collections.abc import Mapping, Sequence

from peft import LoHaConfig
from torch import Tensor

from policies.files.adapters import adapted_modules
from policies.methods.linear_adapter_trunk import LinearAdapterTrunk
from policies.schema import PolicySettings


class LohaTrunk(LinearAdapterTrunk):
    """A trunk with alpha / rank · (B₁ A₁) ⊙ (B₂ A₂) beside linear layers."""

    @staticmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> LoHaConfig:
        return LoHaConfig(
            r=settings.rank,
            alpha=settings.alpha,
            target_modules=list(targets),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )


def saved_loha_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> LoHaConfig:
    """PEFT's description of a saved adapter, whose weights say which layers it adapts."""
    return LohaTrunk._describe(settings, adapted_modules(weights), base)
