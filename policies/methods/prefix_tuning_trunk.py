"""The trunk of prefix tuning: virtual tokens are keys and values in every layer's KV cache."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PrefixTuningConfig
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PROMPT
from policies.files.safe_reading import NO_CODE
from policies.methods.soft_prompt_trunk import SoftPromptTrunk, prompt_config
from policies.schema import PolicySettings
from policies.trunk import Trunk


class PrefixTuningTrunk(SoftPromptTrunk):
    """A trunk in which each role has keys and values of virtual tokens in every layer (Li and Liang 2021)."""

    supports_continuous_batching = False

    @torch.no_grad()
    def _initial_tokens(self, base: PreTrainedModel) -> Tensor:
        """The virtual tokens that every role starts from: keys and values of real tokens.

        Real tokens work best in section 7.4 of the paper.

        Returns:
            `[virtual_tokens, layers · 2 · kv_heads · D]`, float32.
        """
        if getattr(base.config.get_text_config(), "sliding_window", None):
            raise UserError(
                "policy.method prefix_tuning: this model attends through a sliding window, which padding between the "
                "virtual tokens' keys and values and the prompt would shift: use prompt_tuning"
            )
        ids = self._real_tokens(base).unsqueeze(0)  # [1, virtual_tokens]
        cache = DynamicCache(config=base.config)
        base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        states: list[Tensor] = []
        for layer in cache.layers:
            states.append(layer.keys[0].transpose(0, 1))  # [virtual_tokens, kv_heads, D]
            states.append(layer.values[0].transpose(0, 1))
        self._shape = states[0].shape[1:]  # (kv_heads, D)
        return torch.stack(states, dim=1).flatten(1).float()

    def _extend_mask(self, mask: Tensor) -> Tensor:
        """The mask extended by the virtual tokens, which come first in the cache, before any padding."""
        return torch.cat([mask.new_ones(len(mask), self.virtual_token_count), mask], dim=1)  # [B, virtual_tokens + T]

    def _first_pass(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the forward pass that adds the virtual tokens: the cache already holds them when it starts."""
        cache = inputs.pop("past_key_values", None)
        if cache is None:
            cache = DynamicCache(config=self.causal.config)
        inputs["use_cache"] = True
        virtual = self._virtual_tokens(self._role).to(self.causal.dtype)  # [virtual_tokens, layers · 2 · kv_heads · D]
        states = virtual.unflatten(1, (-1, 2, *self._shape))  # [virtual_tokens, layers, 2, kv_heads, D]
        states = states.permute(1, 2, 3, 0, 4).unsqueeze(2)  # [layers, 2, 1, kv_heads, virtual_tokens, D]
        for index, (keys, values) in enumerate(states.unbind(0)):
            keys = keys.expand(len(ids), -1, -1, -1)  # [B, kv_heads, virtual_tokens, D]
            values = values.expand(len(ids), -1, -1, -1)
            cache.update(keys, values, index)
        return Trunk.states(self, input_ids=ids, past_key_values=cache, **inputs)


def saved_prefix_tuning_config(
    settings: PolicySettings, base: str, weights: Mapping[str, Tensor]
) -> PrefixTuningConfig:
    """PEFT's description of saved keys and values; its `token_dim` is the width of one layer's keys."""
    config = AutoConfig.from_pretrained(base, **NO_CODE).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = weights[PROMPT].shape[1] // (2 * config.num_hidden_layers)  # kv_heads · D
    saved = prompt_config(PrefixTuningConfig, base, weights[PROMPT])
    saved.token_dim = width
    saved.num_attention_heads = width // head_dim
    return saved
