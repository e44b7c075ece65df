"""Rows that stand one after another, without padding, and the padded blocks that attention needs of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

MAX_LENGTH_RATIO = 2
"""How much longer than its shortest row a block's longest may be: attention costs the square, a block some calls."""


@dataclass(frozen=True)
class PaddedBlock:
    """B rows of N tokens in all that are padded to the longest's T.

    places: `[N]` int64, each token's index into flattened `[B·T]`.
    """

    places: Tensor
    count: int
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "PaddedBlock":
        places = [torch.arange(length) + row * max(lengths) for row, length in enumerate(lengths)]
        return cls(torch.cat(places).to(device), len(lengths), max(lengths))

    @property
    def full(self) -> bool:
        """Whether all rows are of one length."""
        return len(self.places) == self.count * self.width

    def pad(self, flat: Tensor) -> Tensor:
        """`[N, ...]` to `[B, T, ...]`, with zeros behind the end of each row."""
        shape = (self.count, self.width, *flat.shape[1:])
        if self.full:
            return flat.reshape(shape)
        return flat.new_zeros(self.count * self.width, *flat.shape[1:]).index_copy(0, self.places, flat).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """`[B, T, ...]` to `[N, ...]`."""
        flat = padded.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.places)


@dataclass(frozen=True)
class PackedSequences:
    """Rows in order of length, of N tokens in all.

    order: `[N]` int64, where each token stands among the rows as they came; back: `[N]` int64, the way back.
    positions: `[N]` int64, each token's place in its own row. lengths: tokens of each row, in order.
    """

    order: Tensor
    back: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "PackedSequences":
        """lengths: tokens of each row, in the order in which the rows come."""
        places = torch.arange(sum(lengths)).split(list(lengths))
        sorted_rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
        order = torch.cat([places[row] for row in sorted_rows])
        positions = torch.cat([torch.arange(lengths[row]) for row in sorted_rows])
        in_order = tuple(lengths[row] for row in sorted_rows)
        return cls(order.to(device), order.argsort().to(device), positions.to(device), in_order)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """`[rows + 1]` int64 on the CPU, where each row begins, and where the last one ends."""
        return cu_seqlens_of(self.lengths)

    @cached_property
    def blocks(self) -> tuple[PaddedBlock, ...]:
        """Of rows of about one length, one after another."""
        return tuple(PaddedBlock.of(run, self.order.device) for run in _runs(self.lengths))

    @property
    def sizes(self) -> list[int]:
        """Tokens of each block."""
        return [len(block.places) for block in self.blocks]


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """`[rows + 1]` int64, where each row begins, and where the last one ends."""
    return torch.tensor([0, *accumulate(lengths)])


def _runs(lengths: Sequence[int]) -> Iterator[list[int]]:
    run: list[int] = []
    for length in lengths:
        if run and length > MAX_LENGTH_RATIO * run[0]:
            yield run
            run = []
        run.append(length)
    yield run
