"""A KV cache that appends new tokens into preallocated storage, and can take in the sequences of another cache."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

BLOCK = 64
"""Free token positions at the end of newly allocated storage: long enough that copies are rare, short enough that
little memory stays unused."""


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache for a model; its plain layers copy what they hold once per `BLOCK` tokens, not at every token."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether caches of this kind can be joined. Sliding-window layers cannot: they count positions, not tokens."""
    return bool(cache.layers) and all(type(layer) is PreallocatedLayer for layer in cache.layers)


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """Join the sequences of all caches, in order, in the first one, left-padded with zeros to the longest."""
    joined, *others = caches
    if others:
        for layer, *other_layers in zip(joined.layers, *(cache.layers for cache in others), strict=True):
            layer.append_sequences(other_layers)
    return joined


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc, unused-ignore]  # transformers is not followed
    """Holds and returns what the layer of transformers does, in storage with free positions at the end."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set up empty keys and values, as transformers does, without storage yet."""
        super().lazy_initialization(key_states, value_states)
        self._storage: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values, each `[B, kv_heads, new, D]`.

        Returns:
            All keys and values, each `[B, kv_heads, T, D]`: views into the storage.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._append("keys", self.keys, length, key_states)  # [B, kv_heads, T, D]
        self.values = self._append("values", self.values, length, value_states)  # [B, kv_heads, T, D]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences only, in this order; repeated indices repeat a sequence."""
        super().batch_select_indices(indices)
        self._storage = {}

    def append_sequences(self, others: Sequence["PreallocatedLayer"]) -> None:
        """Append the sequences of other layers to the batch, all left-padded to the longest."""
        layers = [self, *others]
        width = max(layer.get_seq_length() for layer in layers)
        for name in ("keys", "values"):
            storage = _stack_left_padded([getattr(layer, name) for layer in layers], width)
            self._storage[name] = storage  # [B, kv_heads, width + BLOCK, D]
            setattr(self, name, storage[:, :, :width])  # [B, kv_heads, width, D]

    def drop_left(self, columns: int) -> None:
        """Remove the first positions of all sequences."""
        self.keys = self.keys[:, :, columns:]  # [B, kv_heads, T - columns, D]
        self.values = self.values[:, :, columns:]  # [B, kv_heads, T - columns, D]
        self._storage = {}

    def _append(self, name: str, current: Tensor, length: int, new: Tensor) -> Tensor:
        """Write `new` behind the `length` positions of `current`, in larger storage where it would not fit."""
        end = length + new.shape[2]
        storage = self._storage.get(name)
        if storage is None or storage.shape[2] < end:
            batch, kv_heads, _, head_dim = new.shape
            storage = new.new_empty(batch, kv_heads, end + BLOCK, head_dim)  # [B, kv_heads, end + BLOCK, D]
            if length:
                storage[:, :, :length] = current
            self._storage[name] = storage
        storage[:, :, length:end] = new
        return storage[:, :, :end]  # [B, kv_heads, end, D]


def _stack_left_padded(parts: Sequence[Tensor], width: int) -> Tensor:
    """Storage `[B, kv_heads, width + BLOCK, D]` with the sequences of all parts, each `[b, kv_heads, t, D]`."""
    batch = sum(len(part) for part in parts)
    _, kv_heads, _, head_dim = parts[0].shape
    storage = parts[0].new_empty(batch, kv_heads, width + BLOCK, head_dim)  # [B, kv_heads, width + BLOCK, D]
    start = 0
    for part in parts:
        padding = width - part.shape[2]
        target = storage[start : start + len(part), :, :width]  # [b, kv_heads, width, D]
        target[:, :, :padding] = 0  # masked positions must still hold finite numbers
        target[:, :, padding:] = part
        start += len(part)
    return storage
