"""A batch of episodes travels as a few large arrays and arrives bit for bit."""

import pickle
from collections.abc import Sequence

import pytest
import torch

from align.algorithms.episodes import Episode
from align.algorithms.packed_episodes import EpisodeBatch, PackedEpisodes
from tests.random_episodes import assert_same_bits, data_bytes, random_episodes


def sent(episodes: Sequence[Episode]) -> PackedEpisodes:
    arrived = pickle.loads(pickle.dumps(EpisodeBatch(episodes), protocol=5))
    assert isinstance(arrived, PackedEpisodes)
    return arrived


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_round_trip_is_bit_for_bit(seed: int, critic: bool) -> None:
    episodes = random_episodes(seed, 3 + 10 * (seed % 3), critic, seed)
    packed = sent(episodes)
    assert_same_bits([packed[i] for i in range(len(packed))], episodes)


def test_not_a_number_and_signed_zero_survive() -> None:
    row = torch.tensor([float("nan"), -0.0, float("-inf")])
    episode = Episode((1,), (2, 3, 4), row, row, row, row, row)
    assert_same_bits([sent([episode])[0]], [episode])


def test_an_unpacked_episode_can_be_changed_and_shares_nothing() -> None:
    packed = sent(random_episodes(3, 9, critic=True))
    before = packed[1].advantages.clone()
    packed[1].advantages.zero_()
    assert torch.equal(packed[1].advantages, before)
    assert packed[1].advantages.untyped_storage().nbytes() == before.nbytes


def test_a_batch_is_a_list_within_a_process() -> None:
    episodes = random_episodes(3, 9, critic=True)
    assert all(mine is other for mine, other in zip(EpisodeBatch(episodes), episodes, strict=True))


@pytest.mark.parametrize("count", [16, 128, 1024])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_pickled_size_is_that_of_the_tensors(count: int, tokens: int) -> None:
    episodes = random_episodes(count, tokens, critic=True)
    assert len(pickle.dumps(EpisodeBatch(episodes), protocol=5)) <= 1.2 * data_bytes(episodes) + 4096
