"""Adapters inside the base's layers: PEFT's LoRA and (IA)³, and bottleneck adapters."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from policies.errors import UserError
from policies.files.adapters import PREFIX, peft_config
from policies.files.quantization import is_packed
from policies.layers.bottleneck import Bottleneck
from policies.layers.decode_step import PlainStack
from policies.layers.lora import AdaptedLinear, join_siblings
from policies.methods.lora_init import hold_principal, write_loftq, write_pissa
from policies.module_names import outputs_of_sublayers
from policies.trunk import Trunk, states_agree


class LayerAdapterTrunk(Trunk):
    """A trunk whose layers hold an adapter for each role, and use that of one role at a time."""

    def _build(self, base: PreTrainedModel) -> None:
        self._layers: list[BaseTunerLayer | Bottleneck] = list(self._wrap(base))
        self._adapted = [AdaptedLinear(layer) for layer in self._layers if AdaptedLinear.fits(layer)]
        for adapted in self._adapted:
            adapted.layer.forward = adapted
        join_siblings(base)
        self._stack = PlainStack(base) if PlainStack.fits(base) else None
        self._checked = False
        if self.settings.init == "pissa":
            hold_principal(self._layers, self.settings.rank)

    def _wrap(self, base: PreTrainedModel) -> Iterable[BaseTunerLayer]:
        config = peft_config(self.settings, base)
        try:
            model = get_peft_model(base, config, adapter_name=self.roles[0])
            for role in self.roles[1:]:
                model.add_adapter(role, config)
        except ValueError as error:
            raise UserError(f"policy.targets: {error}") from error
        return (module for module in model.modules() if isinstance(module, BaseTunerLayer))

    def initialise(self, *roles: str) -> None:
        layers = {n: m for n, m in self.causal.named_modules() if isinstance(m, LoraLayer)}
        if roles and self.settings.init == "pissa":
            write_pissa(layers.values(), roles, self.settings.rank)
        if roles and self.settings.init == "loftq":
            write_loftq(layers, roles, self.settings.rank, self.base)

    def switch(self, role: str) -> None:
        """Make the next forward passes those of a role.

        Sets the layers' active adapter and leaves `requires_grad` alone: peft's own `set_adapter` would turn the
        other adapters' gradients off, which DeepSpeed does not expect.
        """
        self._role = role
        adapted = role in self.roles
        for layer in self._layers:
            layer._disable_adapters = not adapted
            if adapted:
                layer._active_adapter = [role]

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """The live parameters of a role's adapter by their name in a PEFT file."""
        named = ((name.split("."), parameter) for name, parameter in self.causal.named_parameters())
        return {_in_file(parts, role): parameter for parts, parameter in named if role in parts}

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        super().write_adapter(role, weights)
        for adapted in self._adapted:
            adapted.merged.pop(role, None)

    def merge(self, role: str) -> None:
        """From now on, a role's passes use weights with its adapter, as it now is, in them: faster, and no gradient.

        It costs the memory of the adapted weights once more. Layers that LoRA does not adapt plainly stay as they are.
        """
        if self._stack is not None:
            self._stack.make_room(role)
        for adapted in self._adapted:
            adapted.merge(role)
        if self._stack is not None and not self._checked:
            self._stack, self._checked = self._stack if self._agrees(self._stack, role) else None, True

    def next_states(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        if self._stack is not None and self._role in self._adapted[0].merged:
            return self._stack(self._role, ids, positions, mask, cache)
        return super().next_states(ids, positions, mask, cache)

    @torch.no_grad()
    def _agrees(self, stack: PlainStack, role: str) -> bool:
        """Whether a stack gives new tokens of a merged role the states that the model does."""
        ids = torch.arange(8, device=self.causal.device).view(2, 4) % self.causal.config.vocab_size
        positions, mask, made = torch.full((2, 1), 3), torch.ones(2, 4, dtype=torch.long), []
        with self._acting_as(role):
            for step in (super().next_states, partial(stack, role)):
                cache = DynamicCache(config=self.causal.config)
                self.states(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
                made.append(step(ids[:, 3], positions, mask, cache))
        return states_agree(made[1], made[0])

    def merged_parameter_count(self) -> int:
        return sum(adapted.base.weight.numel() for adapted in self._adapted)

    @torch.no_grad()
    def merged_weights(self, role: str) -> dict[str, Tensor]:
        self.switch(role)
        found: dict[str, Tensor] = {}
        for name, layer in list(self.causal.named_modules()):
            tuned = isinstance(layer, BaseTunerLayer)
            if is_packed(layer.get_base_layer() if tuned else layer):
                found.setdefault(f"{name.removesuffix('.base_layer')}.weight", _unpacked(layer))
            elif tuned:
                layer.merge(adapter_names=[role])
        for name, parameter in self.causal.named_parameters():
            if not set(name.split(".")) & {*self.roles}:
                found.setdefault(name.replace(".base_layer", ""), parameter.detach())
        return found

    def use_module_forwards(self) -> None:
        """Use PEFT's own forward passes, which call the layers' parts as modules."""
        for adapted in self._adapted:
            del adapted.layer.forward
        self._adapted, self._stack = [], None


class BottleneckTrunk(LayerAdapterTrunk):
    """A trunk with bottleneck adapters behind its sublayers."""

    def merged_weights(self, role: str) -> dict[str, Tensor]:
        return Trunk.merged_weights(self, role)

    def _wrap(self, base: PreTrainedModel) -> Iterable[Bottleneck]:
        for parent, name in outputs_of_sublayers(base, self.settings.targets):
            layer = Bottleneck(getattr(parent, name), self.width, self.settings, self.roles)
            setattr(parent, name, layer.to(base.device))
            yield layer


def _unpacked(layer: nn.Module) -> Tensor:
    """The weight of the linear map that a four-bit layer is, its adapter in it, as the layer that it was made from."""
    base: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    inputs = torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)]).to(base.weight.device)
    outputs = layer(inputs).float()
    weight = outputs[:-1] - outputs[-1]
    return weight if getattr(base, "source_cls", None) is Conv1D else weight.T.contiguous()


def _in_file(parts: list[str], role: str) -> str:
    """A parameter's name in PEFT's layout: without the role, and DoRA's magnitudes without `weight`."""
    name = PREFIX + ".".join(part for part in parts if part != role)
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
