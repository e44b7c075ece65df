"""The episodes of a step in shards: each is stored once, and a rank fetches only what it trains on."""

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from align.learner.group import deal_by_length
from align.ppo.episode_shards import EpisodeShards, MinibatchOrders, make_shards
from tests.random_episodes import assert_same_bits, data_bytes, random_episodes


class Store(Sequence[Any]):
    """Pickled values; it counts how often each is fetched."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.objects = [pickle.dumps(value, protocol=5) for value in values]
        self.fetched = [0] * len(values)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: Any) -> Any:
        self.fetched[index] += 1
        return pickle.loads(self.objects[index])


def shuffled(count: int, minibatches: int, epochs: int) -> MinibatchOrders:
    noise = torch.Generator().manual_seed(0)
    return [
        [part.tolist() for part in torch.randperm(count, generator=noise).chunk(minibatches)] for _ in range(epochs)
    ]


def trained_by(rank: int, ranks: int, batch: EpisodeShards, minibatch: Sequence[int]) -> list[int]:
    """The share of a minibatch that a rank trains on."""
    return [minibatch[i] for i in deal_by_length([batch[i].length for i in minibatch], ranks)[rank]]


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_in_the_first_epoch_a_rank_fetches_its_own_shard_alone(ranks: int, minibatches: int) -> None:
    episodes = random_episodes(17, 30, critic=True)
    orders = shuffled(17, minibatches, epochs=2)
    for rank in range(ranks):
        batch = make_shards(episodes, orders, ranks, share=Store)
        loaded = []
        for minibatch in orders[0]:
            loaded += trained_by(rank, ranks, batch, minibatch)
        assert_same_bits([batch[i].load() for i in loaded], [episodes[i] for i in loaded])
        assert isinstance(batch.shards, Store)
        assert batch.shards.fetched == [int(shard == rank) for shard in range(ranks)]


@pytest.mark.parametrize("shards", [1, 2, 3, 20])
def test_any_episode_can_be_loaded_and_no_shard_is_fetched_twice(shards: int) -> None:
    episodes = random_episodes(17, 30, critic=True)
    batch = make_shards(episodes, shuffled(17, 2, epochs=3), shards, share=Store)
    for _ in range(2):
        assert_same_bits([batch[i].load() for i in range(17)], episodes)
    assert isinstance(batch.shards, Store)
    assert max(batch.shards.fetched) == 1


def test_lengths_and_weights_are_known_before_a_shard_is_fetched() -> None:
    episodes = random_episodes(17, 30, critic=True)
    batch = make_shards(episodes, shuffled(17, 2, epochs=1), 3, share=Store)
    assert [batch[i].length for i in range(17)] == [episode.length for episode in episodes]
    token_weights = [float(episode.token_weights.double().sum()) for episode in episodes]
    assert [batch[i].total_weight for i in range(17)] == pytest.approx(token_weights)
    assert isinstance(batch.shards, Store)
    assert batch.shards.fetched == [0, 0, 0]


def test_within_a_process_episodes_are_not_copied() -> None:
    episodes = random_episodes(5, 30, critic=True)
    batch = make_shards(episodes, shuffled(5, 2, epochs=1), 1, share=list)
    assert all(batch[i].load() is episodes[i] for i in range(5))


@pytest.mark.parametrize("count", [16, 128, 1024])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_all_shards_together_take_the_bytes_of_their_tensors(count: int, tokens: int) -> None:
    episodes = random_episodes(count, tokens, critic=True)
    batch = make_shards(episodes, shuffled(count, 4, epochs=2), 2, share=Store)
    assert isinstance(batch.shards, Store)
    assert sum(map(len, batch.shards.objects)) <= 1.2 * data_bytes(episodes) + 2 * 4096
