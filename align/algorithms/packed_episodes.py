"""Episodes on their way to another process: a few large arrays, with the length of each episode."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from align.algorithms.episodes import Episode

ID_COLUMNS = ("prompt_ids", "response_ids")
TENSOR_COLUMNS = ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")


@dataclass(frozen=True)
class Ragged:
    """B sequences of any lengths in one array.

    It holds NumPy arrays because Ray places these, unlike tensors, in shared memory without a copy in the pickle.

    Attributes:
        values: The values of all sequences, one sequence after another; token ids are int32, the rest is float32.
        lengths: `[B]` int64, the number of values of each sequence.
    """

    values: NDArray[Any]
    lengths: NDArray[np.int64]

    @classmethod
    def from_ids(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Pack token ids."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        values = np.empty(int(lengths.sum()), dtype=np.int32)
        start = 0
        for sequence in sequences:
            values[start : start + len(sequence)] = sequence
            start += len(sequence)
        return cls(values, lengths)

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> "Ragged":
        """Pack float32 tensors of one dimension, on the CPU."""
        lengths = np.array([len(tensor) for tensor in tensors], dtype=np.int64)
        values = torch.cat([torch.empty(0), *tensors])
        return cls(values.numpy(), lengths)

    def ids(self) -> list[tuple[int, ...]]:
        """The token ids of each sequence."""
        flat = self.values.tolist()
        return [tuple(flat[start:end]) for start, end in self._ranges()]

    def tensors(self) -> list[Tensor]:
        """The values of each sequence, float32: views of one copy."""
        flat = torch.from_numpy(self.values.copy())  # a copy, because what Ray shares is read-only
        return [flat[start:end] for start, end in self._ranges()]

    def _ranges(self) -> Iterable[tuple[int, int]]:
        ends = np.cumsum(self.lengths).tolist()
        return zip([0, *ends[:-1]], ends, strict=False)  # without sequences there are no ends


@dataclass(frozen=True)
class PackedEpisodes:
    """B episodes as a few large arrays.

    Attributes:
        columns: The token ids and tensors of `Episode` by their names.
        weights: `[B]` float64, the weights.
    """

    columns: dict[str, Ragged]
    weights: NDArray[np.float64]


class EpisodeBatch(list[Episode]):
    """Episodes that are pickled as `PackedEpisodes`; within a process they are a list and nothing is packed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return unpack_episodes, (pack_episodes(self),)


def pack_episodes(episodes: Sequence[Episode]) -> PackedEpisodes:
    """Pack episodes of any lengths, bit for bit."""
    columns = {}
    for name in ID_COLUMNS:
        columns[name] = Ragged.from_ids([getattr(episode, name) for episode in episodes])
    for name in TENSOR_COLUMNS:
        columns[name] = Ragged.from_tensors([getattr(episode, name) for episode in episodes])
    weights = np.array([episode.weight for episode in episodes], dtype=np.float64)
    return PackedEpisodes(columns, weights)


def unpack_episodes(packed: PackedEpisodes) -> EpisodeBatch:
    """The episodes that were packed, in the same order. Their tensors are views: pickle them in a batch only."""
    columns: dict[str, Sequence[Any]] = {}
    for name in ID_COLUMNS:
        columns[name] = packed.columns[name].ids()
    for name in TENSOR_COLUMNS:
        columns[name] = packed.columns[name].tensors()
    episodes = EpisodeBatch()
    for i, weight in enumerate(packed.weights.tolist()):
        values = {name: column[i] for name, column in columns.items()}
        episodes.append(Episode(**values, weight=weight))
    return episodes
