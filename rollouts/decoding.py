"""The forward passes of the rows in flight: prompts that come in, one token a row at a time, rows that leave."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from policies.batching import length_buckets
from policies.trunk import Trunk
from rollouts.kv_cache import can_join, join, make_cache

PREFILL = 4096
"""Tokens of prompts, padding counted, in one pass: the same on every machine, so that rounding is."""


class Decoder:
    """Rows with their keys and values, padded on the left to one width; a new row stands behind those that are there.

    A prompt that several rows share is computed once.
    """

    def __init__(self, trunk: Trunk, role: str) -> None:
        self.trunk, self.role = trunk, role
        self.cache = make_cache(trunk.causal.config)
        self.joins = trunk.supports_continuous_batching and can_join(self.cache)
        """Whether rows may come in beside others, or only all at once."""
        self.mask = torch.ones(0, 0, dtype=torch.long, device=trunk.causal.device)

    def enter(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[N, V]` of the token after each of these prompts, whose rows come in."""
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        place = {prompt: i for i, prompt in enumerate(distinct)}
        groups = [list(range(len(distinct)))]
        if self.joins:  # prompts of about one length together: little padding, and no more than caches hold
            groups = length_buckets([len(prompt) for prompt in distinct], PREFILL)
        parts = [self._prefill([distinct[i] for i in group]) for group in groups]
        computed = {i: row for row, i in enumerate(i for group in groups for i in group)}
        rows = [computed[place[tuple(prompt)]] for prompt in prompts]
        cache = join([cache for _, cache, _ in parts])
        mask, logits = _join_masks([mask for mask, _, _ in parts]), torch.cat([logits for _, _, logits in parts])
        if rows != list(range(len(distinct))):
            index = torch.tensor(rows, device=mask.device)
            cache.batch_select_indices(index)
            mask, logits = mask[index], logits[index]
        if len(self.mask):
            self._trim()
            mask, cache = _join_masks([self.mask, mask]), join([self.cache, cache])
        self.mask, self.cache = mask, cache
        return logits

    def step(self, tokens: Tensor, going: Sequence[bool]) -> Tensor:
        """Logits `[B, V]` of the token after these, `[B]`; a row that does not go on keeps its position."""
        new = torch.tensor(going, dtype=self.mask.dtype, device=self.mask.device)
        self.mask = torch.cat([self.mask, new[:, None]], dim=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        return self.trunk.head(self.trunk.next_states(tokens, positions, self.mask, self.cache), self.role)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.mask = self.mask[index]
        self.cache.batch_select_indices(index)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache, Tensor]:
        """Mask, cache and logits of prompts."""
        width, device = max(map(len, prompts)), self.mask.device
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        cache = make_cache(self.trunk.causal.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.trunk.states(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return mask, cache, self.trunk.head(hidden[:, -1], self.role)

    def _trim(self) -> None:
        """Drop the columns on the left that are padding in every row."""
        if empty := int(self.mask.amax(0).argmax()):
            self.mask = self.mask[:, empty:]
            for layer in self.cache.layers:
                layer.drop_left(empty)


def _join_masks(masks: Sequence[Tensor]) -> Tensor:
    width = max(mask.shape[1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
