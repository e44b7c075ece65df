"""The base class of what replaces the forward pass of one module."""

import copy
import weakref
from typing import Any

from torch import nn


class ForwardReplacement:
    """A callable to assign to `module.forward`.

    It refers to the module weakly, because the module refers to it: a cycle would keep a model's memory until the next
    full garbage collection.
    """

    def __init__(self, module: nn.Module) -> None:
        """Remember the module whose forward pass this is."""
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """The module whose forward pass this is, which exists whenever it is called."""
        return self._module()

    def module_forward(self, *inputs: Any) -> Any:
        """The forward pass that the module's class defines."""
        module = self.module
        return type(module).forward(module, *inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardReplacement":
        """The forward pass of the copy of the module."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        for name, value in vars(self).items():
            setattr(clone, name, copy.deepcopy(value, memo))
        clone._module = weakref.ref(copy.deepcopy(self.module, memo))
        return clone
