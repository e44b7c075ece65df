"""The batches of an epoch of supervised training."""

import math
from collections.abc import Iterator, Sequence
from itertools import count

import torch

from align.runtime.seeds import seed_for
from policies.batching import shares

POOL = 50
"""Batches whose examples are drawn together and then sorted by length. More would be of more similar lengths, fewer
would differ more from epoch to epoch."""


def batches_from(step: int, lengths: Sequence[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    """The batches of a step and of all later ones, epoch after epoch; arguments as of `epoch_batches`."""
    per_epoch = math.ceil(len(lengths) / batch_size)
    for epoch in count(step // per_epoch):
        first = step % per_epoch if epoch == step // per_epoch else 0
        yield from epoch_batches(lengths, batch_size, seed, epoch)[first:]


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch in random order, each of examples of similar length, and thus with little padding.

    An epoch has as few batches as the batch size allows, and their sizes differ by one at most: a small one left over
    would take a step as large as the others, on a noisy gradient. The order depends on seed and epoch alone, so a
    resumed stage continues in the same order.

    Args:
        lengths: The length of each example, in tokens.
        batch_size: Largest number of examples in a batch.
        seed: Seed of all epochs.
        epoch: The epoch, from 0.

    Returns:
        The indices of the examples of each batch.
    """
    sizes = [len(share) for share in shares(len(lengths), math.ceil(len(lengths) / batch_size))]
    generator = torch.Generator().manual_seed(seed_for(seed, "epoch", epoch))
    order = iter(torch.randperm(len(lengths), generator=generator).tolist())
    remaining_sizes = iter(sizes)
    batches: list[list[int]] = []
    for share in shares(len(sizes), math.ceil(len(sizes) / POOL)):
        pool_sizes = [next(remaining_sizes) for _ in share]
        pool = sorted([next(order) for _ in range(sum(pool_sizes))], key=lambda index: lengths[index])
        start = 0
        for size in pool_sizes:
            batches.append(pool[start : start + size])
            start += size
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]
