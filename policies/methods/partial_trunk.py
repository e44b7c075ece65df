"""The trunk of methods that train some of the base's parameters: each role has its own copy of them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PREFIX
from policies.module_names import is_undecayed
from policies.trunk import Trunk

SCALAR_ROLES = ("reward", "critic", "classifier")
"""Roles with a head of their own in place of the base's LM head; `reward_1` is a member of an ensemble."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter is in the base that each role replaces by its own.

    Attributes:
        module: The base's module.
        attribute: The parameter's name in the module.
        name: The parameter's name in a role's file.
        base: The base's parameter; None where a layer without a bias gets one.
    """

    module: Any
    attribute: str
    name: str
    base: nn.Parameter | None

    def start(self) -> Tensor:
        """The initial value of a role's parameter: a copy of the base's, or zeros `[out]` where the base has none."""
        if self.base is not None:
            return self.base.detach().clone()
        return self.module.weight.new_zeros(self.module.weight.shape[0])


class PartialTrunk(Trunk):
    """A trunk in which each role has its own copy of some of the base's parameters.

    A role's parameters are put into the base's modules while its forward passes run: switching swaps references and
    copies nothing.
    """

    def _build(self, base: PreTrainedModel) -> None:
        self._slots = list(self._select(base))
        if not self._slots:
            raise UserError(f"policy.method {self.settings.method}: {type(base).__name__} has no such parameters")
        head = base.get_output_embeddings()
        without_head = [slot for slot in self._slots if slot.module is not head]
        self._slots_of: dict[str, list[Slot]] = {}
        self._parameters_of: dict[str, list[nn.Parameter]] = {}
        for role in self.roles:
            slots = without_head if role.partition("_")[0] in SCALAR_ROLES else self._slots
            self._slots_of[role] = slots
            self._parameters_of[role] = [nn.Parameter(slot.start()) for slot in slots]
        # Registered as a module; checkpoints of supervised stages contain its name.
        parameter_lists = {role: nn.ParameterList(parameters) for role, parameters in self._parameters_of.items()}
        self.own = nn.ModuleDict(parameter_lists)

    @abstractmethod
    def _select(self, base: PreTrainedModel) -> Iterator[Slot]:
        """Yield the slots of the parameters that the method trains."""

    def switch(self, role: str) -> None:
        self._role = role
        for slot in self._slots:
            slot.module._parameters[slot.attribute] = slot.base
        if role in self.roles:
            for slot, parameter in self._slots_and_parameters(role):
                slot.module._parameters[slot.attribute] = parameter

    def head(self, hidden: Tensor, role: str) -> Tensor:
        with self._acting_as(role):
            return super().head(hidden, role)

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return {slot.name: parameter for slot, parameter in self._slots_and_parameters(role)}

    def undecayed(self, role: str) -> set[str]:
        return {slot.name for slot in self._slots_of[role] if is_undecayed(slot.module, slot.attribute)}

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        names = {id(module): name for name, module in self.causal.named_modules()}
        weights: dict[str, Tensor] = {}
        for slot, parameter in self._slots_and_parameters(role):
            weights[f"{names[id(slot.module)]}.{slot.attribute}"] = parameter.detach()
        return weights

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's parameters; those of an LM head are ignored where the role has none."""
        without_slot = {slot.name for slot in self._slots}
        without_slot -= {slot.name for slot in self._slots_of[role]}
        super().write_adapter(role, {name: tensor for name, tensor in weights.items() if name not in without_slot})

    def _slots_and_parameters(self, role: str) -> Iterator[tuple[Slot, nn.Parameter]]:
        """A role's parameters, each with its slot."""
        return zip(self._slots_of[role], self._parameters_of[role], strict=True)


def slots_of(name: str, module: nn.Module, layer: str = "") -> Iterator[Slot]:
    """The slots of a module's direct parameters, without those of its submodules.

    Args:
        name: The module's name in the base.
        module: The base's module.
        layer: A suffix that PEFT appends to the module's name.
    """
    for attribute, parameter in module.named_parameters(recurse=False):
        yield Slot(module, attribute, f"{PREFIX}{name}{layer}.{attribute}", parameter)


def lm_head_slots(model: PreTrainedModel) -> Iterator[Slot]:
    """The slots of the LM head; embeddings that are tied to it stay as they are."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    yield from slots_of(name, head)
