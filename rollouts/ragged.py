"""Sequences of any lengths in one array, as they travel between processes."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """B sequences of any lengths in one array.

    It holds NumPy arrays because Ray places these, unlike tensors, in shared memory without a copy in the pickle.

    Attributes:
        values: The values of all sequences, one sequence after another; token ids are int32, the rest is float32.
        lengths: `[B]` int32, the number of values of each sequence.
    """

    values: NDArray[Any]
    lengths: NDArray[np.int32]

    @classmethod
    def from_ids(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Pack token ids."""
        # struct reads a tuple of integers in two thirds of the time that NumPy takes.
        packed = [struct.pack(f"{len(sequence)}i", *sequence) for sequence in sequences]
        return cls(np.frombuffer(b"".join(packed), dtype=np.int32), _lengths(sequences))

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Ragged":
        """Pack float32 tensors of one dimension, on the CPU."""
        values = torch.cat([torch.empty(0), *tensors])
        return cls(values.numpy(), _lengths(tensors))

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> tuple[int, ...]:
        """The token ids of a sequence."""
        return tuple(self._sequence(index).tolist())

    def tensor(self, index: int) -> Tensor:
        """The values of a sequence, float32: a copy, which owns its storage; what Ray shares is read-only."""
        return torch.from_numpy(self._sequence(index).copy())

    def all_ids(self) -> list[tuple[int, ...]]:
        """The token ids of each sequence."""
        return [self.ids(index) for index in range(len(self))]

    def _sequence(self, index: int) -> NDArray[Any]:
        return self.values[self._starts[index] : self._starts[index + 1]]

    @cached_property
    def _starts(self) -> list[int]:
        """The first value of each sequence, and at last the number of values."""
        starts: list[int] = np.cumsum([0, *self.lengths.tolist()]).tolist()
        return starts


def _lengths(sequences: Iterable[Sequence[int] | Tensor]) -> NDArray[np.int32]:
    return np.array([len(sequence) for sequence in sequences], dtype=np.int32)
