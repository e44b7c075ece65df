"""The episodes of a step in shards, of which each rank fetches only those that it trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from align.algorithms.episodes import Episode
from align.algorithms.packed_episodes import EpisodeBatch, PackedEpisodes
from align.learner.group import deal_by_length

MinibatchOrders = Sequence[Sequence[Sequence[int]]]
"""For each epoch, for each minibatch, the indices of its episodes."""

Shard = EpisodeBatch | PackedEpisodes
"""Episodes; packed where they came from another process."""


@dataclass(frozen=True)
class EpisodeShards:
    """B episodes in shards. Lengths and weights are known before a shard is fetched.

    Attributes:
        shards: The shards, each of which is fetched when it is read.
        places: `[B, 2]` int32, the shard of each episode and its position in it.
        lengths: `[B]` int32, tokens of prompt and response of each episode.
        total_weights: `[B]` float64, weights of all response tokens of each episode.
    """

    shards: Sequence[Shard]
    places: NDArray[np.int32]
    lengths: NDArray[np.int32]
    total_weights: NDArray[np.float64]
    _fetched: dict[int, Shard] = field(default_factory=dict, init=False)

    def __getitem__(self, index: int) -> "StoredEpisode":
        return StoredEpisode(self, index)

    def load(self, index: int) -> Episode:
        """Read an episode, and fetch its shard before the first of its episodes."""
        shard, position = self.places[index].tolist()
        if shard not in self._fetched:
            self._fetched[shard] = self.shards[shard]
        return self._fetched[shard][position]


@dataclass(frozen=True)
class StoredEpisode:
    """An episode that is in a shard until it is loaded."""

    batch: EpisodeShards
    index: int

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return int(self.batch.lengths[self.index])

    @property
    def total_weight(self) -> float:
        """Weights of all response tokens."""
        return float(self.batch.total_weights[self.index])

    def load(self) -> Episode:
        """Read the episode."""
        return self.batch.load(self.index)


def make_shards(
    episodes: Sequence[Episode],
    orders: MinibatchOrders,
    count: int,
    share: Callable[[Sequence[Shard]], Sequence[Shard]],
) -> EpisodeShards:
    """Cut the episodes of a step into one shard per rank.

    Args:
        episodes: `[B]`.
        orders: The minibatches that will be trained on.
        count: Number of ranks.
        share: Places the shards where the ranks can fetch them.
    """
    lengths = [episode.length for episode in episodes]
    places = np.zeros((len(episodes), 2), dtype=np.int32)
    shards: list[Shard] = []
    for shard, indices in enumerate(first_trained(lengths, orders, count)):
        shards.append(EpisodeBatch(episodes[i] for i in indices))
        for position, index in enumerate(indices):
            places[index] = shard, position
    total_weights = [episode.total_weight for episode in episodes]
    return EpisodeShards(share(shards), places, np.array(lengths, dtype=np.int32), np.array(total_weights))


def first_trained(lengths: Sequence[int], orders: MinibatchOrders, count: int) -> list[list[int]]:
    """The episodes that each rank is the first to train on: in the first epoch a rank needs no others.

    Args:
        lengths: `[B]`, tokens of each episode.
        orders: The minibatches.
        count: Number of ranks.
    """
    indices_by_rank: list[list[int]] = [[] for _ in range(count)]
    placed: set[int] = set()
    for minibatch in chain.from_iterable(orders):
        shares = deal_by_length([lengths[i] for i in minibatch], count)
        for indices, share in zip(indices_by_rank, shares, strict=True):
            indices += [minibatch[position] for position in share if minibatch[position] not in placed]
        placed.update(minibatch)
    return indices_by_rank
