"""A batch of episodes travels as a few large arrays and arrives bit for bit."""

import pickle

import pytest
import torch

from align.algorithms.episodes import Episode
from align.algorithms.packed_episodes import EpisodeBatch, pack_episodes, unpack_episodes


def drawn(count: int, tokens: int, critic: bool, seed: int = 0) -> list[Episode]:
    """Episodes of up to `tokens` tokens, some without a prompt, with values of every magnitude."""
    noise = torch.Generator().manual_seed(seed)
    episodes = []
    for _ in range(count):
        prompt, response = torch.randint(0, tokens, (2,), generator=noise).tolist()
        ids = torch.randint(0, 2**31 - 1, (prompt + response + 1,), generator=noise).tolist()
        parts = torch.randn(5, response + 1, generator=noise).exp().pow(9)
        none = torch.empty(0)
        episode = Episode(
            prompt_ids=tuple(ids[:prompt]),
            response_ids=tuple(ids[prompt:]),
            old_logprobs=parts[0].clone(),
            reference_logprobs=parts[1].clone(),
            advantages=parts[2].clone(),
            returns=parts[3].clone() if critic else none,
            old_values=parts[4].clone() if critic else none,
            weight=1.0 / (response + 1),
        )
        episodes.append(episode)
    return episodes


def assert_same_bits(one: list[Episode], two: list[Episode]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        for mine, other in zip(vars(left).values(), vars(right).values(), strict=True):
            if isinstance(mine, torch.Tensor):
                assert mine.dtype == other.dtype
                assert torch.equal(mine.view(torch.int32), other.view(torch.int32))
            else:
                assert mine == other
                assert type(mine) is type(other)


@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_round_trip_is_bit_for_bit(seed: int, critic: bool) -> None:
    episodes = drawn(seed, 3 + 10 * (seed % 3), critic, seed)
    assert_same_bits(unpack_episodes(pack_episodes(episodes)), episodes)
    assert_same_bits(pickle.loads(pickle.dumps(EpisodeBatch(episodes), protocol=5)), episodes)


def test_not_a_number_and_signed_zero_survive() -> None:
    row = torch.tensor([float("nan"), -0.0, float("-inf")])
    episode = Episode((1,), (2, 3, 4), row, row, row, row, row)
    assert_same_bits(unpack_episodes(pack_episodes([episode])), [episode])


def test_a_batch_is_a_list_within_a_process() -> None:
    episodes = drawn(3, 9, critic=True)
    assert all(mine is other for mine, other in zip(EpisodeBatch(episodes), episodes, strict=True))


@pytest.mark.parametrize("count", [16, 128, 1024])
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_pickled_size_is_that_of_the_tensors(count: int, tokens: int) -> None:
    episodes = drawn(count, tokens, critic=True)
    data = sum(4 * episode.length + 5 * 4 * len(episode.response_ids) for episode in episodes)
    assert len(pickle.dumps(EpisodeBatch(episodes), protocol=5)) <= 1.2 * data + 4096
