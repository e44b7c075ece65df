"""What answers a batch of prompts, and the simplest such thing: one engine in this process."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from policies.trunk import AdapterWeights
from rollouts.engine import Engine, Sampling
from rollouts.trajectory import Request, Trajectory

T = TypeVar("T")


class Pool(Protocol):
    """Answers prompts under the adapter that was loaded last."""

    def load_adapter(self, version: int, weights: AdapterWeights) -> None: ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """One trajectory a request, in their order."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """One engine in this process."""

    def __init__(self, engine: Engine, chunk: int) -> None:
        """chunk: requests that the engine is handed at a time, as workers of a pool are."""
        self.engine, self.chunk = engine, chunk

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        self.engine.load_adapter(version, weights)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return [t for chunk in split_chunks(requests, self.chunk) for t in self.engine.generate(chunk, sampling)]

    def close(self) -> None:
        pass  # the engine goes with its owner


def split_chunks(rows: Sequence[T], size: int) -> list[Sequence[T]]:
    """Chunks of at most so many rows. Rounding depends on what is decoded together, and a chunk always is."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
