"""The trunk of `top_layers`: each role has its own last decoder layers, final norm and LM head."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.methods.partial_trunk import PartialTrunk, Slot, lm_head_slots, slots_of
from policies.module_names import blocks, norms


class TopLayersTrunk(PartialTrunk):
    """A trunk in which each role has its own last `policy.layers` decoder layers, final norm and LM head."""

    def _select(self, base: PreTrainedModel) -> Iterator[Slot]:
        selected = _top_modules(base, self.settings.layers)
        for name, module in base.named_modules():
            if id(module) in selected:
                yield from slots_of(name, module)
        yield from lm_head_slots(base)


def _top_modules(model: PreTrainedModel, count: int) -> set[int]:
    """The `id` of all modules in the last decoder layers, and of the norms outside the decoder layers."""
    stack = blocks(model)
    if count > len(stack):
        raise UserError(f"policy.layers is {count}, and {type(model).__name__} has {len(stack)} decoder layers")
    top: list[nn.Module] = []
    for layer in list(stack)[-count:]:
        top += layer.modules()
    inside = set(stack.modules())
    top += [norm for norm in norms(model).values() if norm not in inside]
    return {id(module) for module in top}
