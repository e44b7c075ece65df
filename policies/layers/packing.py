"""Packed (varlen) sequences, without padding, and the padded blocks that torch's attention needs of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

MAX_LENGTH_RATIO = 2
"""Largest ratio of the longest to the shortest sequence of a block. The cost of attention grows with the square of the
padded length, which favours many blocks; each block costs a few calls, which favours few."""


@dataclass(frozen=True)
class PaddedBlock:
    """B sequences of N tokens in all, padded to T, the length of the longest.

    Attributes:
        indices: `[N]` int64, each token's index into flattened `[B·T]`.
        count: B.
        width: T.
    """

    indices: Tensor
    count: int
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "PaddedBlock":
        """The block of sequences with these numbers of tokens."""
        width = max(lengths)
        indices = [torch.arange(length) + index * width for index, length in enumerate(lengths)]
        return cls(torch.cat(indices).to(device), len(lengths), width)

    @property
    def full(self) -> bool:
        """Whether all sequences have the same length."""
        return len(self.indices) == self.count * self.width

    def pad(self, flat: Tensor) -> Tensor:
        """`[N, ...]` to `[B, T, ...]`, with zeros after the end of each sequence."""
        shape = (self.count, self.width, *flat.shape[1:])
        if self.full:
            return flat.reshape(shape)
        padded = flat.new_zeros(self.count * self.width, *flat.shape[1:])  # [B·T, ...]
        return padded.index_copy(0, self.indices, flat).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """`[B, T, ...]` to `[N, ...]`."""
        flat = padded.flatten(0, 1)  # [B·T, ...]
        return flat if self.full else flat.index_select(0, self.indices)


@dataclass(frozen=True)
class PackedSequences:
    """Sequences of N tokens in all, packed in order of length.

    Attributes:
        order: `[N]` int64. `ids[order]` are the tokens in order of length.
        inverse: `[N]` int64, the inverse of `order`.
        positions: `[N]` int64, each token's position in its own sequence, in order of length.
        lengths: Tokens of each sequence, in order of length.
    """

    order: Tensor
    inverse: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "PackedSequences":
        """Pack sequences.

        Args:
            lengths: Tokens of each sequence, in the order in which the sequences come.
            device: Where the index tensors will be used.
        """
        by_sequence = torch.arange(sum(lengths)).split(list(lengths))
        by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
        sorted_lengths = tuple(lengths[index] for index in by_length)
        order = torch.cat([by_sequence[index] for index in by_length])  # [N]
        positions = torch.cat([torch.arange(length) for length in sorted_lengths])  # [N]
        return cls(order.to(device), order.argsort().to(device), positions.to(device), sorted_lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`[B + 1]` int64 on the CPU: where each sequence starts, and where the last one ends."""
        return cu_seqlens_of(self.lengths)

    @cached_property
    def blocks(self) -> tuple[PaddedBlock, ...]:
        """Blocks of consecutive sequences of similar length."""
        return tuple(PaddedBlock.of(lengths, self.order.device) for lengths in _split_by_ratio(self.lengths))

    @property
    def sizes(self) -> list[int]:
        """Tokens of each block."""
        return [len(block.indices) for block in self.blocks]


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """`[B + 1]` int64: where each sequence starts, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)])


def _split_by_ratio(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Ascending lengths in runs whose last is at most `MAX_LENGTH_RATIO` times its first."""
    run: list[int] = []
    for length in lengths:
        if run and length > MAX_LENGTH_RATIO * run[0]:
            yield run
            run = []
        run.append(length)
    yield run
