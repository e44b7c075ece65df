"""Random numbers that depend on their purpose and not on when they are drawn.

Every seed is a hash of the experiment's seed and of names and numbers that say what it is for. A run resumed at step n
therefore draws what the uninterrupted run draws there, and no random states have to be saved.
"""

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """Derive a seed for a purpose, for example `seed_for(0, "rollout", 17)`.

    Args:
        seed: The seed of the experiment.
        purpose: Names and numbers that say what the seed is for. Another purpose gives another seed.

    Returns:
        A seed of 63 bits, the same in every process and on every machine.
    """
    digest = hashlib.sha256(repr((seed, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(count: int, seed: int, *purpose: str | int) -> list[int]:
    """Draw a random permutation.

    Args:
        count: The number of elements.
        seed: The seed of the experiment.
        purpose: What the permutation is for, as in `seed_for`.

    Returns:
        The indices 0 to `count` - 1 in random order.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, *purpose))
    indices: list[int] = torch.randperm(count, generator=generator).tolist()
    return indices
