"""The trunk of LoKr: PEFT's layers."""

from collections.abc import Mapping, Sequence

from peft import LoKrConfig
from torch import Tensor

from policies.files.adapters import adapted_modules
from policies.methods.linear_adapter_trunk import LinearAdapterTrunk
from policies.schema import PolicySettings


class LokrTrunk(LinearAdapterTrunk):
    """A trunk with alpha / rank · C ⊗ (B A) beside linear layers."""

    @staticmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> LoKrConfig:
        return LoKrConfig(
            r=settings.rank,
            alpha=settings.alpha,
            decompose_factor=settings.kronecker_factor,
            target_modules=list(targets),
            base_model_name_or_path=base,
            task_type="CAUSAL_LM",
        )


def saved_lokr_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> LoKrConfig:
    """PEFT's description of a saved adapter, whose weights say which layers it adapts."""
    return LokrTrunk._describe(settings, adapted_modules(weights), base)
