"""Rows that stand one after another, without padding, and the padded blocks that attention needs of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPREAD = 2
"""How much longer than its shortest row a block's longest may be: attention costs the square, a block some calls."""
PAIRS = 2**16
"""Pairs of tokens in a block on a CPU: so few that their scores, for each head, stay in its caches."""


@dataclass(frozen=True)
class Block:
    """B rows of N tokens in all that are padded to the longest's T.

    places: `[N]` int64, each token's index into flattened `[B·T]`.
    """

    places: Tensor
    count: int
    width: int
    _by_head: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Block":
        places = [torch.arange(length) + row * max(lengths) for row, length in enumerate(lengths)]
        return cls(torch.cat(places).to(device), len(lengths), max(lengths))

    def by_head(self, heads: int) -> Tensor:
        """`[N·heads]` int64, the index of each head of each token into flattened `[B·heads·T]`."""
        if heads not in self._by_head:  # every layer asks
            first = self.places // self.width * (heads - 1)
            heads_of_row = first[:, None] + torch.arange(heads, device=first.device)
            self._by_head[heads] = (self.places[:, None] + heads_of_row * self.width).flatten()
        return self._by_head[heads]

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
class Rows:
    """Rows in order of length, of N tokens in all.

    order: `[N]` int64, where each token stands among the rows as they came; back: `[N]` int64, the way back.
    positions: `[N]` int64, each token's place in its own row. blocks: of rows of about one length, one after another.
    """

    order: Tensor
    back: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Rows":
        """lengths: tokens of each row, in the order in which the rows come."""
        places = torch.arange(sum(lengths)).split(list(lengths))
        sorted_rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
        order = torch.cat([places[row] for row in sorted_rows])
        positions = torch.cat([torch.arange(lengths[row]) for row in sorted_rows])
        pairs = PAIRS if device.type == "cpu" else None
        blocks = tuple(Block.of(run, device) for run in _runs([lengths[row] for row in sorted_rows], pairs))
        return cls(order.to(device), order.argsort().to(device), positions.to(device), blocks)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each block."""
        return [len(block.places) for block in self.blocks]


def _runs(lengths: Sequence[int], pairs: int | None) -> Iterator[list[int]]:
    run: list[int] = []
    for length in lengths:
        if run and (length > SPREAD * run[0] or (pairs and length**2 * (len(run) + 1) > pairs)):
            yield run
            run = []
        run.append(length)
    yield run
