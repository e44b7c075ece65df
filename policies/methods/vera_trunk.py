"""The trunk of VeRA: PEFT's layers."""

import warnings
from collections.abc import Mapping, Sequence

from peft import VeraConfig
from torch import Tensor

from policies.files.adapters import adapted_modules
from policies.methods.linear_adapter_trunk import LinearAdapterTrunk
from policies.schema import PolicySettings


class VeraTrunk(LinearAdapterTrunk):
    """A trunk with b ⊙ B (d ⊙ A x) beside linear layers, where the frozen A and B are the same in all of them."""

    adapts_conv1d = True

    @staticmethod
    def _describe(settings: PolicySettings, targets: Sequence[str], base: str) -> VeraConfig:
        with warnings.catch_warnings():
            # PEFT warns that A and B are made from the seed again, as the paper does: the file holds the scales alone.
            warnings.filterwarnings("ignore", message="Specified to not save vera_A")
            return VeraConfig(
                r=settings.rank,
                vera_dropout=settings.dropout,
                projection_prng_key=settings.projection_seed,
                save_projection=False,
                target_modules=list(targets),
                base_model_name_or_path=base,
                task_type="CAUSAL_LM",
            )


def saved_vera_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> VeraConfig:
    """PEFT's description of a saved adapter, whose weights say which layers it adapts."""
    return VeraTrunk._describe(settings, adapted_modules(weights), base)
