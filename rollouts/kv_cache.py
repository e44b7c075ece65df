"""A key-value cache that writes new tokens where there is room for them, and takes in the rows of another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

BLOCK = 64
"""Tokens that a row has room for beyond those that it holds when its storage is made."""


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """The cache of a model; its plain layers copy what they hold once in `BLOCK` tokens, and not at each."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether rows of several caches of this kind may stand in one: a layer that slides counts places, not tokens."""
    return bool(cache.layers) and all(type(layer) is RoomyLayer for layer in cache.layers)


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache with the rows of all, in their order, padded on the left with zeros to the widest."""
    joined = caches[0]
    if len(caches) == 1:
        return joined
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layers[0].take_in(layers[1:])
    return joined


class RoomyLayer(DynamicLayer):
    """What transformers' own layer holds and returns, in storage with room behind it."""

    keys: Tensor
    values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the new states, `[B, groups, new, D]`; returns all, views into the storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        self.keys = self._append("keys", self.keys, start, key_states)
        self.values = self._append("values", self.values, start, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows only."""
        super().batch_select_indices(indices)
        self._rooms = {}

    def take_in(self, others: Sequence["RoomyLayer"]) -> None:
        """Put the rows of other layers behind these."""
        layers = [self, *others]
        width = max(layer.get_seq_length() for layer in layers)
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in layers]
            rows, (_, groups, _, size) = sum(map(len, parts)), parts[0].shape
            room = parts[0].new_empty(rows, groups, width + BLOCK, size)
            start = 0
            for part in parts:
                own = room[start : start + len(part), :, :width]
                own[:, :, : width - part.shape[2]] = 0  # what is masked must still be a number
                own[:, :, width - part.shape[2] :] = part
                start += len(part)
            self._rooms[name] = room
            setattr(self, name, room[:, :, :width])

    def drop_left(self, columns: int) -> None:
        """Forget the first tokens of all rows."""
        self.keys, self.values = self.keys[:, :, columns:], self.values[:, :, columns:]
        self._rooms = {}

    def _append(self, name: str, held: Tensor, start: int, new: Tensor) -> Tensor:
        end = start + new.shape[2]
        room = self._rooms.get(name)
        if room is None or room.shape[2] < end:
            room = new.new_empty(*new.shape[:2], end + BLOCK, new.shape[3])
            if start:
                room[:, :, :start] = held
            self._rooms[name] = room
        room[:, :, start:end] = new
        return room[:, :, :end]
