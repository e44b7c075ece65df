"""When batches are generated: at once, in the background, or in the background with weight updates in between."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, Trajectory

TrajectoriesFuture = Callable[[], list[Trajectory]]
"""Waits for a submitted batch and returns its trajectories."""


class RolloutSource(Protocol):
    """Takes batches, each with the weights to generate it with; the caller collects the trajectories later."""

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        """Submit a batch.

        Args:
            version: The version of the weights.
            weights: The tensors of the adapter by name.
            requests: The prompts, each with its own seed.
            sampling: How the responses are drawn.

        Returns:
            A function that waits for the batch and returns one trajectory per request, in the same order.
        """
        ...


class SynchronousRollouts:
    """Generates each batch while the caller waits."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        """Generate a batch; the future only returns it."""
        self.pool.load_adapter(version, weights)
        trajectories = self.pool.generate(requests, sampling)
        return lambda: trajectories


class AsyncRollouts:
    """Generates batches in a background thread, one after another, each with the weights it was submitted with.

    It is also a pool: other calls, for example those of an evaluation, wait in the same queue as the batches.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    @property
    def peak_memory(self) -> int | None:
        """As of the pool that it uses."""
        return self.pool.peak_memory

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        """Queue a batch."""

        def generate_batch() -> list[Trajectory]:
            self.pool.load_adapter(version, weights)
            return self.pool.generate(requests, sampling)

        return self._thread.submit(generate_batch).result

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights for the next `generate`, once all batches submitted before are done."""
        self._thread.submit(self.pool.load_adapter, version, weights).result()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request, once all batches submitted before are done."""
        return self._thread.submit(self.pool.generate, requests, sampling).result()

    def close(self) -> None:
        """Abort the current batch, drop the queued ones and release the engines."""
        self.pool.close()  # aborts the current batch
        self._thread.shutdown(cancel_futures=True)


class UpdatablePool(Pool, Protocol):
    """A pool that can switch to new weights in the middle of a batch."""

    def update_weights(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights for everything that is handed out from now on; safe to call from any thread."""
        ...


class PartialRollouts(AsyncRollouts):
    """Like AsyncRollouts, but unfinished and queued batches continue with the weights submitted last."""

    def __init__(self, pool: UpdatablePool) -> None:
        super().__init__(pool)
        self._update_weights = pool.update_weights

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        """Queue a batch, and switch the current and the queued ones to these weights."""
        self._newest = (version, weights)
        self._update_weights(version, weights)

        def generate_batch() -> list[Trajectory]:
            self.pool.load_adapter(*self._newest)
            return self.pool.generate(requests, sampling)

        return self._thread.submit(generate_batch).result
