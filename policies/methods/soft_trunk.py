"""Soft prompts: virtual tokens before the prompt, as embeddings or as keys and values."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PromptEncoder, PromptEncoderConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from policies.errors import UserError
from policies.files.adapters import PROMPT
from policies.files.safe_reading import NO_CODE
from policies.trunk import Trunk


class SoftPromptTrunk(Trunk):
    """A trunk in which each role has virtual tokens of its own, which stand before the first token of every row.

    Callers see the real tokens alone: ids, masks, positions and states that they give and get have no virtual ones.
    """

    def _build(self, base: PreTrainedModel) -> None:
        self.count = self.settings.virtual_tokens
        start = self._start(base)
        self.tokens = nn.ParameterDict({role: nn.Parameter(start.clone()) for role in self.roles})
        self.encoders = nn.ModuleDict()

    def _start(self, base: PreTrainedModel) -> Tensor:
        """What every role starts from, `[tokens, H]`: embeddings of real tokens (Lester et al. 2021, section 3.2)."""
        return base.get_input_embeddings()(self._real_tokens(base)).detach().float()

    def _real_tokens(self, base: PreTrainedModel) -> Tensor:
        if self.settings.init_text is None:
            return torch.randint(base.config.vocab_size, (self.count,), device="cpu").to(base.device)
        tokenizer = AutoTokenizer.from_pretrained(self.base, **NO_CODE)
        ids = tokenizer(self.settings.init_text, add_special_tokens=False)["input_ids"]
        return torch.tensor((ids * (self.count // len(ids) + 1))[: self.count], device=base.device)

    def _supports_packing(self) -> bool:
        """Virtual tokens stand before the first token of every row, and would have to between them."""
        return False

    def switch(self, role: str) -> None:
        self._role = role

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        """What is trained of a role: its virtual tokens, or the encoder that makes them."""
        if role in self.encoders:
            return dict(self.encoders[role].named_parameters())
        return {PROMPT: self.tokens[role]}

    def read_adapter(self, role: str) -> dict[str, Tensor]:
        return {PROMPT: self._virtual(role).detach().clone()}

    def write_adapter(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Overwrite a role's virtual tokens; its encoder, where it has one, has done its work."""
        if role in self.encoders:
            del self.encoders[role]
        super().write_adapter(role, weights)

    def start_training(self, role: str) -> None:
        """p-tuning (Liu et al. 2021, "GPT understands, too"): from now on an encoder makes the role's tokens."""
        if self.settings.method == "p_tuning":
            config = PromptEncoderConfig(
                num_virtual_tokens=self.count,
                token_dim=self.width,
                num_transformer_submodules=1,
                encoder_reparameterization_type=self.settings.encoder.upper(),
                encoder_hidden_size=self.settings.encoder_width,
            )
            encoder = PromptEncoder(config).to(self.causal.device)
            encoder.embedding.weight.data.copy_(self.tokens[role])
            self.encoders[role] = encoder

    def _virtual(self, role: str) -> Tensor:
        if role in self.encoders:
            return self.encoders[role](torch.arange(self.count, device=self.causal.device))
        return self.tokens[role]

    def states(self, **inputs: Any) -> Tensor:
        if self._role not in self.roles:
            return super().states(**inputs)
        ids, cache = inputs.pop("input_ids"), inputs.get("past_key_values")
        if (mask := inputs.get("attention_mask")) is not None:
            inputs["attention_mask"] = self._with_virtual(mask)
        if (positions := inputs.get("position_ids")) is not None:
            inputs["position_ids"] = positions + self.count
        if cache is not None and cache.get_seq_length():
            return super().states(input_ids=ids, **inputs)
        return self._first(ids, inputs)

    def _with_virtual(self, mask: Tensor) -> Tensor:
        """Padding stands on the left: with the virtual tokens, there are as many more ones on the right."""
        return torch.cat([mask, mask.new_ones(len(mask), self.count)], dim=1)

    def _first(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The pass in which the virtual tokens come in: as embeddings before those of the ids."""
        embeddings = self.causal.get_input_embeddings()(ids)
        virtual = self._virtual(self._role).to(embeddings.dtype).expand(len(ids), -1, -1)
        together = torch.cat([virtual, embeddings], dim=1)
        if (mask := inputs.get("attention_mask")) is not None:  # between padding and prompt: a window counts places
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            place = torch.arange(together.shape[1], device=ids.device)
            padding = (mask == 0).sum(-1, keepdim=True)
            order = torch.where(place < padding, place + self.count, place)
            order = torch.where((place >= padding) & (place < padding + self.count), place - padding, order)
            together = together.gather(1, order.unsqueeze(-1).expand_as(together))
        return super().states(inputs_embeds=together, **inputs)[:, self.count :]


class PrefixTrunk(SoftPromptTrunk):
    """Li and Liang 2021, "Prefix-tuning": each role has keys and values of virtual tokens in every layer."""

    supports_continuous_batching = False

    @torch.no_grad()
    def _start(self, base: PreTrainedModel) -> Tensor:
        """Keys and values of real tokens, `[tokens, layers · 2 · groups · D]`, as their section 7.4 finds best."""
        if getattr(base.config.get_text_config(), "sliding_window", None):
            raise UserError(
                "policy.method prefix_tuning: this model attends through a sliding window, in which keys and values "
                "that stand before padding are not where they should be: use prompt_tuning"
            )
        ids = self._real_tokens(base).unsqueeze(0)
        cache = DynamicCache(config=base.config)
        base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        states = [state[0].transpose(0, 1) for layer in cache.layers for state in (layer.keys, layer.values)]
        self._shape = states[0].shape[1:]
        return torch.stack(states, dim=1).flatten(1).float()

    def _with_virtual(self, mask: Tensor) -> Tensor:
        """Keys and values of the virtual tokens stand before all others, padding too."""
        return torch.cat([mask.new_ones(len(mask), self.count), mask], dim=1)

    def _first(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The pass in which the virtual tokens come in: as what the cache holds before it."""
        cache = inputs.pop("past_key_values", None)
        cache = DynamicCache(config=self.causal.config) if cache is None else cache
        inputs["use_cache"] = True
        states = self._virtual(self._role).to(self.causal.dtype).unflatten(1, (-1, 2, *self._shape))
        for index, layer in enumerate(states.permute(1, 2, 3, 0, 4).unsqueeze(2).unbind(0)):
            keys, values = (state.expand(len(ids), -1, -1, -1) for state in layer)
            cache.update(keys, values, index)
        return Trunk.states(self, input_ids=ids, past_key_values=cache, **inputs)
