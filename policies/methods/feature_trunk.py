"""The trunk of `feature`: each role has its own LM head on the frozen base."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from policies.methods.partial_trunk import PartialTrunk, Slot, lm_head_slots


class FeatureTrunk(PartialTrunk):
    """A trunk in which each role without a scalar head has its own LM head."""

    def _select(self, base: PreTrainedModel) -> Iterator[Slot]:
        return lm_head_slots(base)
