"""Batches of responses that are asked for before they are needed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, Trajectory

TrajectoriesFuture = Callable[[], list[Trajectory]]
"""Waits for a batch that was asked for."""


class RolloutSource(Protocol):
    """A pool that can also be asked for a batch under given weights, to be fetched later."""

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        """Have these requests answered under these weights."""
        ...


class SynchronousRollouts:
    """Answers while the caller waits."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        trajectories = _answer(self.pool, version, weights, requests, sampling)
        return lambda: trajectories


class AsyncRollouts:
    """Answers while the caller goes on: one batch after the other, each under the weights that came with it.

    It is a pool itself: what is asked of it otherwise, as by an evaluation, takes its turn among the batches.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        return self._thread.submit(_answer, self.pool, version, weights, requests, sampling).result

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        self._thread.submit(self.pool.load_adapter, version, weights).result()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return self._thread.submit(self.pool.generate, requests, sampling).result()

    def close(self) -> None:
        self.pool.close()  # which ends the batch at hand
        self._thread.shutdown(cancel_futures=True)


class UpdatablePool(Pool, Protocol):
    """A pool that takes up new weights within a batch."""

    def update_weights(self, version: int, weights: AdapterWeights) -> None:
        """What goes on of the batch at hand, and what is new, is under these weights; from any thread."""
        ...


class PartialRollouts(AsyncRollouts):
    """Ahead, but what is under way, or was asked for earlier, goes on under the weights that came last."""

    def __init__(self, pool: UpdatablePool) -> None:
        super().__init__(pool)
        self._update_weights = pool.update_weights

    def submit(
        self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
    ) -> TrajectoriesFuture:
        self._newest = version, weights
        self._update_weights(version, weights)
        return self._thread.submit(lambda: _answer(self.pool, *self._newest, requests, sampling)).result


def _answer(
    pool: Pool, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
) -> list[Trajectory]:
    pool.load_adapter(version, weights)
    return pool.generate(requests, sampling)
