"""The forward passes of decoding: prefill new prompts, advance active sequences by a token, remove finished ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import DynamicCache

from policies.batching import length_buckets
from policies.trunk import Trunk
from rollouts.kv_cache import can_join, join, make_cache

PREFILL_TOKENS = 4096
"""Prompt tokens per prefill pass, padding included. The same on every machine, because what is computed together
decides how it is rounded."""


@dataclass(frozen=True)
class _Prefill:
    """Left-padded prompts after their forward pass.

    Attributes:
        mask: `[B, T]` int64, 1 for a token, 0 for padding.
        cache: Their keys and values.
        logits: `[B, V]`, of the next token.
    """

    mask: Tensor
    cache: DynamicCache
    logits: Tensor


class Decoder:
    """The active sequences and their KV cache, left-padded to one width. New sequences come last in the batch.

    A prompt shared by several sequences is prefilled once.
    """

    def __init__(self, trunk: Trunk, role: str) -> None:
        self.trunk = trunk
        self.role = role
        self.cache = make_cache(trunk.causal.config)
        self.supports_joining = trunk.supports_continuous_batching and can_join(self.cache)
        """Whether sequences can be added while others are active, or only to an empty decoder."""
        self.mask = torch.ones(0, 0, dtype=torch.long, device=trunk.causal.device)  # [B, T]

    def add(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Prefill the prompts of new sequences.

        Args:
            prompts: N token id sequences, which may be equal.

        Returns:
            Logits `[N, V]` of the first token after each prompt.
        """
        new = self._repeat_shared(prompts)
        if len(self.mask):
            self._trim_padding()
            self.mask = _join_masks([self.mask, new.mask])  # [B + N, T]
            self.cache = join([self.cache, new.cache])
        else:
            self.mask = new.mask  # [N, T]
            self.cache = new.cache
        return new.logits

    def step(self, tokens: Tensor, unfinished: Sequence[bool]) -> Tensor:
        """Append one token to each active sequence.

        Args:
            tokens: `[B]` int64.
            unfinished: B flags. The token of a finished sequence is masked, so that its position does not advance.

        Returns:
            Logits `[B, V]` of the next token of each sequence.
        """
        new_column = torch.tensor(unfinished, dtype=self.mask.dtype, device=self.mask.device)  # [B]
        self.mask = torch.cat([self.mask, new_column[:, None]], dim=1)  # [B, T + 1]
        positions = self.mask.sum(-1, keepdim=True) - 1  # [B, 1]
        hidden = self.trunk.next_states(tokens, positions, self.mask, self.cache)  # [B, H]
        return self.trunk.head(hidden, self.role)  # [B, V]

    def keep(self, sequences: Sequence[int]) -> None:
        """Remove all sequences but those at these indices of the batch."""
        index = torch.tensor(sequences, dtype=torch.long, device=self.mask.device)  # [kept]
        self.mask = self.mask[index]  # [kept, T]
        self.cache.batch_select_indices(index)

    def _repeat_shared(self, prompts: Sequence[tuple[int, ...]]) -> _Prefill:
        """Prefill each distinct prompt once, then give every sequence a copy."""
        distinct = list(dict.fromkeys(prompts))
        groups = self._prefill_groups(distinct)
        parts = [self._prefill(group) for group in groups]
        mask = _join_masks([part.mask for part in parts])  # [distinct, T]
        cache = join([part.cache for part in parts])
        logits = torch.cat([part.logits for part in parts])  # [distinct, V]

        index_of = {prompt: index for index, prompt in enumerate(chain.from_iterable(groups))}
        indices = [index_of[prompt] for prompt in prompts]
        if indices != list(range(len(distinct))):
            index = torch.tensor(indices, device=mask.device)  # [N]
            mask = mask[index]  # [N, T]
            logits = logits[index]  # [N, V]
            cache.batch_select_indices(index)
        return _Prefill(mask, cache, logits)

    def _prefill_groups(self, prompts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Group prompts of similar length, for little padding, where their caches can be joined afterwards."""
        if not self.supports_joining:
            return [list(prompts)]
        lengths = [len(prompt) for prompt in prompts]
        groups: list[list[tuple[int, ...]]] = []
        for indices in length_buckets(lengths, PREFILL_TOKENS):
            groups.append([prompts[index] for index in indices])
        return groups

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> _Prefill:
        """Run one forward pass over prompts, left-padded to the longest."""
        width = max(len(prompt) for prompt in prompts)
        device = self.mask.device
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        masked = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        ids = torch.tensor(padded, device=device)  # [B, T]
        mask = torch.tensor(masked, device=device)  # [B, T]
        cache = make_cache(self.trunk.causal.config)
        hidden = self.trunk.states(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),  # [B, T]; padding is at position 0
            past_key_values=cache,
            use_cache=True,
        )  # [B, T, H]
        logits = self.trunk.head(hidden[:, -1], self.role)  # [B, V]
        return _Prefill(mask, cache, logits)

    def _trim_padding(self) -> None:
        """Drop the leading columns that are padding in every sequence."""
        empty = int(self.mask.amax(0).argmax())
        if empty:
            self.mask = self.mask[:, empty:]  # [B, T - empty]
            for layer in self.cache.layers:
                layer.drop_left(empty)


def _join_masks(masks: Sequence[Tensor]) -> Tensor:
    """Stack masks `[b, t]` of several batches, left-padded with zeros to the widest: `[B, T]`."""
    width = max(mask.shape[1] for mask in masks)
    padded = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks]
    return torch.cat(padded)
