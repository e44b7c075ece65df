"""The trunk of LoRA and QLoRA: PEFT's layers, with faster forward passes where they are plain LoRA."""

from collections.abc import Mapping
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies.layers.decode_step import DecodeStep
from policies.layers.lora import LoraForward, join_siblings
from policies.lora_init import hold_principal, write_loftq, write_pissa
from policies.methods.layer_adapter_trunk import PeftTrunk
from policies.probes import states_agree
from policies.schema import PolicySettings


class LoraTrunk(PeftTrunk):
    """A trunk with low-rank matrices beside linear layers."""

    def _build(self, base: PreTrainedModel) -> None:
        super()._build(base)
        self._forwards = [LoraForward(layer) for layer in self._layers if LoraForward.fits(layer)]
        for forward in self._forwards:
            forward.module.forward = forward
        join_siblings(base)
        self._decode_step = DecodeStep(base) if DecodeStep.fits(base) else None
        self._decode_step_is_checked = False
        if self.settings.init == "pissa":
            hold_principal(self._layers, self.settings.rank)

    def _peft_config(self, base: PreTrainedModel) -> LoraConfig:
        return lora_config(self.settings, base.config.name_or_path)

    def initialise(self, *roles: str) -> None:
        layers = {name: module for name, module in self.causal.named_modules() if isinstance(module, LoraLayer)}
        if roles and self.settings.init == "pissa":
            write_pissa(layers.values(), roles, self.settings.rank)
        if roles and self.settings.init == "loftq":
            write_loftq(layers, roles, self.settings.rank, self.base)

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        super().write_adapter(role, weights)
        for forward in self._forwards:
            forward.merged.pop(role, None)

    def merge(self, role: str) -> None:
        """Let a role's forward passes use a copy of the weights with its current adapter merged into them.

        They are faster then, and give no gradients. It costs the memory of another copy of the adapted weights. Layers
        that are not plain LoRA stay as they are.
        """
        if self._decode_step is not None:
            self._decode_step.allocate(role)
        for forward in self._forwards:
            forward.merge(role)
        if self._decode_step is not None and not self._decode_step_is_checked:
            if not self._agrees(self._decode_step, role):
                self._decode_step = None
            self._decode_step_is_checked = True

    def next_states(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        if self._decode_step is not None and self._role in self._forwards[0].merged:
            return self._decode_step(self._role, ids, positions, mask, cache)
        return super().next_states(ids, positions, mask, cache)

    @torch.no_grad()
    def _agrees(self, decode_step: DecodeStep, role: str) -> bool:
        """Whether the decode step computes the same states of new tokens, for a merged role, as the model."""
        ids = torch.arange(8, device=self.causal.device).view(2, 4) % self.causal.config.vocab_size  # [B, T]
        positions = torch.full((2, 1), 3)
        mask = torch.ones(2, 4, dtype=torch.long)
        states: list[Tensor] = []
        with self._acting_as(role):
            for step in (super().next_states, partial(decode_step, role)):
                cache = DynamicCache(config=self.causal.config)
                self.states(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
                states.append(step(ids[:, 3], positions, mask, cache))  # [B, H]
        by_model, by_decode_step = states
        return states_agree(by_decode_step, by_model)

    def merged_parameter_count(self) -> int:
        return sum(forward.base.weight.numel() for forward in self._forwards)

    def use_module_forwards(self) -> None:
        """Use PEFT's own forward passes, which call the layers' parts as modules."""
        for forward in self._forwards:
            del forward.module.forward
        self._forwards = []
        self._decode_step = None


def lora_config(settings: PolicySettings, base: str) -> LoraConfig:
    """PEFT's description of a LoRA adapter.

    Args:
        settings: The adapter's settings.
        base: Folder or hub name of the model that it is for.
    """
    return LoraConfig(
        r=settings.full_rank,
        lora_alpha=settings.full_alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets or "all-linear",
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )


def saved_lora_config(settings: PolicySettings, base: str, weights: Mapping[str, Tensor]) -> LoraConfig:
    """PEFT's description of a saved LoRA adapter; the settings say all of it."""
    return lora_config(settings, base)
