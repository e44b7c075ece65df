"""Random numbers that depend on what they are for and not on when they are drawn.

Every seed is a hash of the experiment's seed and of names and numbers that say its purpose, so a run that resumes at
step n draws what the uninterrupted run drew there, and nothing about random states has to be saved.
"""

import hashlib

import torch


def seed_for(seed: int, *purpose: str | int) -> int:
    """A seed of 63 bits for a purpose, such as `seed_for(0, "rollout", step, index)`."""
    digest = hashlib.sha256(repr((seed, purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(count: int, seed: int, *purpose: str | int) -> list[int]:
    """A random order of `count` things."""
    generator = torch.Generator().manual_seed(seed_for(seed, *purpose))
    return torch.randperm(count, generator=generator).tolist()
