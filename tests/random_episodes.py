"""Random episodes, and their comparison bit for bit."""

from collections.abc import Iterable

import torch

from align.algorithms.episodes import Episode


def random_episodes(count: int, tokens: int, critic: bool, seed: int = 0) -> list[Episode]:
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
            inserted=((0, response // 2),) if response % 3 == 2 else (),
        )
        episodes.append(episode)
    return episodes


def data_bytes(episodes: Iterable[Episode]) -> int:
    """Bytes of the token ids and the tensors of episodes."""
    total = 0
    for episode in episodes:
        tensors = [value for value in vars(episode).values() if isinstance(value, torch.Tensor)]
        total += 4 * episode.length + sum(tensor.nbytes for tensor in tensors)
    return total


def assert_same_bits(ones: Iterable[object], others: Iterable[object]) -> None:
    """Compare records of the same class field by field."""
    for one, other in zip(ones, others, strict=True):
        assert type(one) is type(other)
        for left, right in zip(vars(one).values(), vars(other).values(), strict=True):
            if isinstance(left, torch.Tensor):
                assert left.dtype == right.dtype
                assert torch.equal(left.view(torch.int32), right.view(torch.int32))
            else:
                assert repr(left) == repr(right)
                assert type(left) is type(right)
