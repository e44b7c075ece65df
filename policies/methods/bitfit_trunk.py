"""The trunk of BitFit: each role has its own biases."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from policies.files.adapters import PREFIX
from policies.methods.partial_trunk import PartialTrunk, Slot, slots_of
from policies.module_names import blocks, linears


class BitFitTrunk(PartialTrunk):
    """A trunk in which each role has its own biases; a base without any gets them in its linear layers, at zero."""

    def _select(self, base: PreTrainedModel) -> Iterator[Slot]:
        biases = list(_biases(base))
        if biases:
            yield from biases
            return
        for name, module in linears(base).items():
            yield Slot(module, "bias", f"{PREFIX}{name}.bias", None)


def _biases(model: PreTrainedModel) -> Iterator[Slot]:
    """All biases of the decoder layers."""
    inside = {id(module) for module in blocks(model).modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            yield from (slot for slot in slots_of(name, module) if slot.attribute == "bias")
