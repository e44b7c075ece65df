"""The trunk of full fine-tuning: every role is a complete model."""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from policies.module_names import undecayed_names
from policies.trunk import Trunk


class FullTrunk(Trunk):
    """A trunk that shares nothing: a role's adapter is here all of its weights.

    Each role costs the memory of a model, and starts as a copy of the base.
    """

    def _build(self, base: PreTrainedModel) -> None:
        copies: dict[str, nn.Module] = {role: copy.deepcopy(base) for role in self.roles[1:]}
        self.models = nn.ModuleDict(copies | {self.roles[0]: base})

    def switch(self, role: str) -> None:
        """Make the next forward passes those of a role."""
        self._role = role

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live weights of a role by their names in the base; tied weights once."""
        return dict(self._model_of(role).named_parameters())

    def undecayed(self, role: str) -> set[str]:
        return undecayed_names(self._model_of(role))

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        return dict(self.read_adapter(role))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, where gradients flow: less memory, more time."""
        for role in self.roles:
            self._model_of(role).gradient_checkpointing_enable({"use_reentrant": False})
        self._recomputed = [m for m in self.models.modules() if isinstance(m, GradientCheckpointingLayer)]

    def _model_of(self, role: str) -> PreTrainedModel:
        return self.models[role] if role in self.roles else self.causal
