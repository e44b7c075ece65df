"""Training some of the base's own parameters: biases, norms, or the top. Each role has copies of these alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PREFIX
from policies.module_names import blocks, linears, norms
from policies.trunk import Trunk

WITHOUT_HEAD = ("reward", "critic")
"""Roles that have a scalar head in the place of the base's output layer; `reward_1` is a member of an ensemble."""


@dataclass(frozen=True)
class Slot:
    """A place in the base where a role puts a parameter of its own. A layer without a bias has room for one."""

    module: Any
    attribute: str
    name: str
    base: nn.Parameter | None

    def start(self) -> Tensor:
        """What a role's parameter starts as: the base's, or zero where the base has none."""
        if self.base is not None:
            return self.base.detach().clone()
        return self.module.weight.new_zeros(self.module.weight.shape[0])


class PartialTrunk(Trunk):
    """A trunk some of whose parameters each role has for itself.

    A role's parameters stand in the base's places while its passes run: switching moves references, not numbers.
    """

    def _build(self, base: PreTrainedModel) -> None:
        self._slots = self._select(base)
        if not self._slots:
            raise UserError(f"policy.method {self.settings.method}: {type(base).__name__} has nothing of the kind")
        head = base.get_output_embeddings()
        self._of = {
            role: [slot for slot in self._slots if not (role.partition("_")[0] in WITHOUT_HEAD and slot.module is head)]
            for role in self.roles
        }
        self._own = {role: [nn.Parameter(slot.start()) for slot in slots] for role, slots in self._of.items()}
        self.own = nn.ModuleDict({role: nn.ParameterList(own) for role, own in self._own.items()})

    def _select(self, base: PreTrainedModel) -> list[Slot]:
        chosen: dict[str, Any] = {
            "bitfit": _biases,
            "layer_norm": _norms,
            "top_layers": lambda model: _top(model, self.settings.layers),
            "feature": _head,
        }
        return list(chosen[self.settings.method](base))

    def switch(self, role: str) -> None:
        self._role = role
        for slot in self._slots:
            slot.module._parameters[slot.attribute] = slot.base
        if role in self.roles:
            for slot, parameter in zip(self._of[role], self._own[role], strict=True):
                slot.module._parameters[slot.attribute] = parameter

    def head(self, hidden: Tensor, role: str) -> Tensor:
        with self._acting_as(role):
            return super().head(hidden, role)

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return dict(zip((slot.name for slot in self._of[role]), self._own[role], strict=True))

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        names = {id(module): name for name, module in self.causal.named_modules()}
        return {
            f"{names[id(slot.module)]}.{slot.attribute}": parameter.detach()
            for slot, parameter in zip(self._of[role], self._own[role], strict=True)
        }

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's parameters; an output layer among them is left out where the role has none."""
        spare = {slot.name for slot in self._slots} - {slot.name for slot in self._of[role]}
        super().write_adapter(role, {name: tensor for name, tensor in weights.items() if name not in spare})


def _slots(name: str, module: nn.Module, layer: str = "") -> Iterator[Slot]:
    """The parameters that a module itself holds; layer: what PEFT puts behind the module's name."""
    for attribute, parameter in module.named_parameters(recurse=False):
        yield Slot(module, attribute, f"{PREFIX}{name}{layer}.{attribute}", parameter)


def _biases(model: PreTrainedModel) -> Iterator[Slot]:
    """Ben Zaken et al. 2022, "BitFit": every bias; a base without one gets them in its linear layers, at zero."""
    inside = {id(module) for module in blocks(model).modules()}
    biases = [
        slot
        for name, module in model.named_modules()
        if id(module) in inside
        for slot in _slots(name, module)
        if slot.attribute == "bias"
    ]
    if biases:
        yield from biases
        return
    for name, module in linears(model).items():
        yield Slot(module, "bias", f"{PREFIX}{name}.bias", None)


def _norms(model: PreTrainedModel) -> Iterator[Slot]:
    """Zhao et al. 2024, "Tuning LayerNorm in attention": gains and biases of all norms, named as PEFT names them."""
    for name, module in norms(model).items():
        yield from _slots(name, module, layer=".ln_tuning_layers")


def _top(model: PreTrainedModel, layers: int) -> Iterator[Slot]:
    """The last decoder layers, the norm behind them, and the output layer."""
    stack = blocks(model)
    if layers > len(stack):
        raise UserError(f"policy.layers is {layers}, and {type(model).__name__} has {len(stack)} decoder layers")
    top = {id(module) for layer in list(stack)[-layers:] for module in layer.modules()}
    inside = {id(module) for module in stack.modules()}
    behind = {id(module) for module in norms(model).values()} - inside
    for name, module in model.named_modules():
        if id(module) in top | behind:
            yield from _slots(name, module)
    yield from _head(model)


def _head(model: PreTrainedModel) -> Iterator[Slot]:
    """The output layer; embeddings that are tied to it stay as they are."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    yield from _slots(name, head)
