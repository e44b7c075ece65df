"""The interface of engine pools, and the simplest one: a single engine in this process."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from policies.trunk import AdapterWeights
from rollouts.engine import Engine, Sampling
from rollouts.trajectory import Request, Trajectory

T = TypeVar("T")


class Pool(Protocol):
    """Generates responses with the adapter that was loaded last, on one or more engines."""

    @property
    def peak_memory(self) -> int | None:
        """The peak memory of an engine's process in bytes; None: it is this process, or the peak is not known."""
        ...

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights from now on.

        Args:
            version: The version that new tokens carry.
            weights: The tensors of the adapter by name.
        """
        ...

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request.

        Args:
            requests: The prompts, each with its own seed.
            sampling: How the responses are drawn.

        Returns:
            One trajectory per request, in the same order.
        """
        ...

    def close(self) -> None:
        """Release the engines."""
        ...


class LocalPool:
    """One engine in this process."""

    peak_memory = None

    def __init__(self, engine: Engine, chunk_size: int) -> None:
        """Create a pool.

        Args:
            engine: The engine, which belongs to the caller.
            chunk_size: Requests that the engine is handed at a time, as in a Ray pool.
        """
        self.engine = engine
        self.chunk_size = chunk_size

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights from now on."""
        self.engine.load_adapter(version, weights)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request, in the same order."""
        trajectories: list[Trajectory] = []
        for chunk in split_chunks(requests, self.chunk_size):
            trajectories += self.engine.generate(chunk, sampling)
        return trajectories

    def close(self) -> None:
        """Nothing to release: the engine belongs to the caller."""


def split_chunks(items: Sequence[T], chunk_size: int) -> list[Sequence[T]]:
    """Consecutive chunks of at most `chunk_size` items.

    Rounding depends on what is decoded together, so the requests of a chunk always go to one engine in one call.
    """
    return [items[start : start + chunk_size] for start in range(0, len(items), chunk_size)]
