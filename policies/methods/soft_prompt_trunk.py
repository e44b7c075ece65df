"""The trunk of prompt tuning, the base class of all soft prompts: virtual tokens, here as embeddings."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PromptTuningConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from policies.files.adapters import PROMPT
from policies.files.safe_reading import NO_CODE
from policies.schema import PolicySettings
from policies.trunk import Trunk


class SoftPromptTrunk(Trunk):
    """A trunk in which each role has its own virtual tokens before the first token of every sequence.

    Callers see the real tokens alone: the ids, masks and positions that they pass, and the states that they get back,
    do not include virtual ones.
    """

    def _build(self, base: PreTrainedModel) -> None:
        self.virtual_token_count = self.settings.virtual_tokens
        initial = self._initial_tokens(base)
        self.tokens = nn.ParameterDict({role: nn.Parameter(initial.clone()) for role in self.roles})

    def _initial_tokens(self, base: PreTrainedModel) -> Tensor:
        """The virtual tokens that every role starts from: embeddings of real tokens (Lester et al. 2021, section 3.2).

        Returns:
            `[virtual_tokens, H]`, float32.
        """
        return base.get_input_embeddings()(self._real_tokens(base)).detach().float()

    def _real_tokens(self, base: PreTrainedModel) -> Tensor:
        """Ids `[virtual_tokens]` of `policy.init_text`, repeated as often as needed; without a text, random ones."""
        if self.settings.init_text is None:
            return torch.randint(base.config.vocab_size, (self.virtual_token_count,), device="cpu").to(base.device)
        tokenizer = AutoTokenizer.from_pretrained(self.base, **NO_CODE)
        ids: list[int] = tokenizer(self.settings.init_text, add_special_tokens=False)["input_ids"]
        repeated = ids * (self.virtual_token_count // len(ids) + 1)
        return torch.tensor(repeated[: self.virtual_token_count], device=base.device)

    def _supports_packing(self) -> bool:
        """No: every packed sequence would need virtual tokens before its first token."""
        return False

    def switch(self, role: str) -> None:
        self._role = role

    def adapter(self, role: str) -> dict[str, nn.Parameter]:
        return {PROMPT: self.tokens[role]}

    def read_adapter(self, role: str) -> dict[str, Tensor]:
        return {PROMPT: self._virtual_tokens(role).detach().clone()}

    def _virtual_tokens(self, role: str) -> Tensor:
        """A role's virtual tokens as a forward pass uses them, `[virtual_tokens, H]`."""
        return self.tokens[role]

    def states(self, **inputs: Any) -> Tensor:
        if self._role not in self.roles:
            return super().states(**inputs)
        ids = inputs.pop("input_ids")
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = self._extend_mask(mask)
        positions = inputs.get("position_ids")
        if positions is not None:
            inputs["position_ids"] = positions + self.virtual_token_count
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():  # the virtual tokens are in the cache already
            return super().states(input_ids=ids, **inputs)
        return self._first_pass(ids, inputs)

    def _extend_mask(self, mask: Tensor) -> Tensor:
        """The mask `[B, T]` extended by the virtual tokens, `[B, virtual_tokens + T]`.

        Padding is on the left, and the virtual tokens follow it: so the mask is extended by ones on the right.
        """
        return torch.cat([mask, mask.new_ones(len(mask), self.virtual_token_count)], dim=1)

    def _first_pass(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Run the forward pass that adds the virtual tokens, as embeddings before those of the ids `[B, T]`."""
        real = self.causal.get_input_embeddings()(ids)  # [B, T, H]
        virtual = self._virtual_tokens(self._role).to(real.dtype).expand(len(ids), -1, -1)  # [B, virtual_tokens, H]
        embeddings = torch.cat([virtual, real], dim=1)  # [B, virtual_tokens + T, H]
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            embeddings = self._move_behind_padding(embeddings, mask)
        return super().states(inputs_embeds=embeddings, **inputs)[:, self.virtual_token_count :]  # [B, T, H]

    def _move_behind_padding(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Move the virtual tokens from before the padding to between padding and prompt.

        A sliding window counts positions in the batch, so that padding must not lie between virtual and real tokens.

        Args:
            embeddings: `[B, virtual_tokens + T, H]`, the virtual tokens first.
            mask: `[B, virtual_tokens + T]`, 0 for the padding on the left.
        """
        index = torch.arange(embeddings.shape[1], device=embeddings.device)  # [virtual_tokens + T]
        padding = (mask == 0).sum(-1, keepdim=True)  # [B, 1]
        is_padding = index < padding  # [B, virtual_tokens + T]
        is_virtual = (index >= padding) & (index < padding + self.virtual_token_count)  # [B, virtual_tokens + T]
        order = torch.where(is_padding, index + self.virtual_token_count, index)  # [B, virtual_tokens + T]
        order = torch.where(is_virtual, index - padding, order)
        return embeddings.gather(1, order.unsqueeze(-1).expand_as(embeddings))


def saved_prompt_tuning_config(
    settings: PolicySettings, base: str, weights: Mapping[str, Tensor]
) -> PromptTuningConfig:
    """PEFT's description of a saved soft prompt."""
    return prompt_config(PromptTuningConfig, base, weights[PROMPT])


def prompt_config(kind: type[PeftConfig], base: str, tokens: Tensor) -> PeftConfig:
    """PEFT's description of virtual tokens as embeddings.

    Args:
        kind: PEFT's class for the method.
        base: Folder or hub name of the model that the tokens are for.
        tokens: `[virtual_tokens, H]`.
    """
    config = AutoConfig.from_pretrained(base, **NO_CODE).get_text_config()
    return kind(
        num_virtual_tokens=len(tokens),
        token_dim=tokens.shape[1],
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_transformer_submodules=1,
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
