"""The batches of an epoch of supervised training."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from align.runtime.seeds import seed_for
from policies.batching import shares

POOL = 50
"""Batches whose examples are drawn together and then sorted by length. More would be of more similar lengths, fewer
would differ more from epoch to epoch."""


class LengthBatches(Sampler[list[int]]):
    """Batches in random order, each of examples of similar length, and thus with little padding.

    An epoch has as few batches as the batch size allows, and their sizes differ by one at most: a small one left over
    would take a step as large as the others, on a noisy gradient.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Set up the batches.

        Args:
            lengths: The length of each example, in tokens.
            batch_size: Largest number of examples in a batch.
            seed: Seed of all epochs.
        """
        self.lengths = lengths
        self.sizes = [len(share) for share in shares(len(lengths), math.ceil(len(lengths) / batch_size))]
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. The order depends on seed and epoch alone, so a resumed stage continues in the same order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, "epoch", self.epoch))
        order = iter(torch.randperm(len(self.lengths), generator=generator).tolist())
        sizes = iter(self.sizes)
        batches: list[list[int]] = []
        for share in shares(len(self.sizes), math.ceil(len(self.sizes) / POOL)):
            pool_sizes = [next(sizes) for _ in share]
            pool = sorted([next(order) for _ in range(sum(pool_sizes))], key=lambda index: self.lengths[index])
            start = 0
            for size in pool_sizes:
                batches.append(pool[start : start + size])
                start += size
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]
