"""Batches of responses that are asked for before they are needed."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, Trajectory

Answers = Callable[[], list[Trajectory]]
"""Waits for a batch that was asked for."""


class Asker(Protocol):
    """A pool that can also be asked for a batch under given weights, to be fetched later."""

    def ask(self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling) -> Answers:
        """Have these requests answered under these weights."""
        ...


class AtOnce:
    """Answers while the caller waits."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def ask(self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling) -> Answers:
        trajectories = _answer(self.pool, version, weights, requests, sampling)
        return lambda: trajectories


class Ahead:
    """Answers while the caller goes on: one batch after the other, each under the weights that came with it.

    It is a pool itself: what is asked of it otherwise, as by an evaluation, takes its turn among the batches.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

    def ask(self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling) -> Answers:
        return self._thread.submit(_answer, self.pool, version, weights, requests, sampling).result

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        self._thread.submit(self.pool.load_adapter, version, weights).result()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        return self._thread.submit(self.pool.generate, requests, sampling).result()

    def close(self) -> None:
        self.pool.close()  # which ends the batch at hand
        self._thread.shutdown(cancel_futures=True)


class Renewable(Pool, Protocol):
    """A pool that takes up new weights within a batch."""

    def renew(self, version: int, weights: AdapterWeights) -> None:
        """What goes on of the batch at hand, and what is new, is under these weights; from any thread."""
        ...


class Renewing(Ahead):
    """Ahead, but what is under way, or was asked for earlier, goes on under the weights that came last."""

    def __init__(self, pool: Renewable) -> None:
        super().__init__(pool)
        self._renew = pool.renew

    def ask(self, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling) -> Answers:
        self._newest = version, weights
        self._renew(version, weights)
        return self._thread.submit(lambda: _answer(self.pool, *self._newest, requests, sampling)).result


def _answer(
    pool: Pool, version: int, weights: AdapterWeights, requests: Sequence[Request], sampling: Sampling
) -> list[Trajectory]:
    pool.load_adapter(version, weights)
    return pool.generate(requests, sampling)
