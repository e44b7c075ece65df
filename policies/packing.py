"""Rows that stand one after another, without padding, and the padded rows that attention alone needs of them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where the N tokens of B rows stand, of which the longest has T.

    positions: `[N]` int64, each token's place in its own row; places: `[N]` int64, its index into flattened `[B·T]`.
    """

    positions: Tensor
    places: Tensor
    count: int
    width: int

    @classmethod
    def of(cls, lengths: Tensor) -> "Rows":
        """lengths: `[B]` int64, tokens of each row, on the device of the tokens."""
        starts = lengths.cumsum(0) - lengths
        total, width = int(lengths.sum()), int(lengths.max())
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)
        positions = torch.arange(total, device=lengths.device) - starts[row]
        return cls(positions, row * width + positions, len(lengths), width)

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
