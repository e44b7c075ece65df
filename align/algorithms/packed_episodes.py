"""Episodes on their way to another process: a few large arrays, of which each episode is unpacked when it is read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align.algorithms.episodes import Episode
from rollouts.ragged import Ragged

ID_COLUMNS = ("prompt_ids", "response_ids")
TENSOR_COLUMNS = ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")


@dataclass(frozen=True)
class PackedEpisodes:
    """B episodes as a few large arrays, bit for bit.

    Attributes:
        columns: The token ids and tensors of `Episode` by their names.
        weights: `[B]` float64, the weights.
        inserted: The spans of tokens that the policy has not sampled, of each episode.
    """

    columns: dict[str, Ragged]
    weights: NDArray[np.float64]
    inserted: tuple[tuple[tuple[int, int], ...], ...]

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Episode:
        """Unpack an episode."""
        values: dict[str, Any] = {}
        for name in ID_COLUMNS:
            values[name] = self.columns[name].ids(index)
        for name in TENSOR_COLUMNS:
            values[name] = self.columns[name].tensor(index)
        return Episode(**values, weight=float(self.weights[index]), inserted=self.inserted[index])


class EpisodeBatch(list[Episode]):
    """Episodes that arrive in another process as `PackedEpisodes`; within a process nothing is packed."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        columns = {}
        for name in ID_COLUMNS:
            columns[name] = Ragged.from_ids([getattr(episode, name) for episode in self])
        for name in TENSOR_COLUMNS:
            columns[name] = Ragged.from_tensors([getattr(episode, name) for episode in self])
        weights = np.array([episode.weight for episode in self], dtype=np.float64)
        inserted = tuple(episode.inserted for episode in self)
        return PackedEpisodes, (columns, weights, inserted)
