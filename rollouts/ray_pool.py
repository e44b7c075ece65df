"""A pool of Ray actors that may die."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from policies.adapters import fingerprint
from policies.trunk import AdapterWeights
from rollouts.engine import Engine, Sampling
from rollouts.trajectory import Request, Trajectory
from rollouts.worker import Reply, Worker

POLL = 0.01
"""Seconds that the pool waits for answers before it looks at deadlines."""

Chunk = tuple[int, dict[str, Any]]
"""Its place in the batch, and the arguments of `Worker.generate`."""


class RayPool:
    """Workers that are handed `rows` requests at a time.

    A chunk's composition does not depend on who takes it, so neither do the responses. A worker that dies, raises,
    answers under other weights or stays silent for `timeout` seconds is replaced and its chunk goes to another; a new
    worker is handed nothing before it has confirmed the current weights by version and fingerprint.
    """

    def __init__(
        self, build: Callable[[], Engine], workers: int, rows: int, timeout: float, threads: int, gpus: float
    ) -> None:
        """build: makes the engine, in the worker's process. gpus: what each worker reserves."""
        self.rows = rows
        self.timeout = timeout
        self._spawn = lambda: (
            ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0).remote(build, threads)
        )
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
        self._manager.add_actors([self._spawn() for _ in range(workers)])
        self._most_losses = 3 * workers
        self._losses = 0
        self._ready: set[int] = set()

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Every worker holds these weights when this returns. One copy a node travels through Ray's object store."""
        self._held = (version, fingerprint(weights))
        self._weights = ray.put(dict(weights))
        self._ready.clear()
        self._run(deque(), {})

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        chunks = [requests[start : start + self.rows] for start in range(0, len(requests), self.rows)]
        done: dict[int, list[Trajectory]] = {}
        work = {index: {"requests": chunk, "sampling": sampling} for index, chunk in enumerate(chunks)}
        self._run(deque(work.items()), done)
        return [trajectory for index in range(len(chunks)) for trajectory in done[index]]

    def close(self) -> None:
        self._manager.clear()

    def _run(self, waiting: deque[Chunk], done: dict[int, list[Trajectory]]) -> None:
        """Hand out what is waiting until all of it is in `done` and every worker holds the current weights."""
        total = len(waiting)
        out: dict[int, tuple[float, Chunk | None]] = {}  # worker: deadline, and its chunk or None: loading
        while len(done) < total or len(self._ready) < self._manager.num_actors():
            self._hand_out(waiting, out)
            for result in self._manager.fetch_ready_async_reqs(timeout_seconds=POLL):
                _, chunk = out.pop(result.actor_id)
                if not result.ok:
                    self._replace(result.actor_id, chunk, waiting, result.get())
                    continue
                reply: Reply = result.get()
                if (reply.version, reply.fingerprint) != self._held:
                    held = f"it holds version {reply.version} and not {self._held[0]}"
                    self._replace(result.actor_id, chunk, waiting, RuntimeError(f"wrong adapter: {held}"))
                    continue
                self._losses = 0
                self._ready.add(result.actor_id)
                if chunk is not None:
                    done[chunk[0]] = reply.trajectories
            now = time.monotonic()
            for worker in [worker for worker, (deadline, _) in out.items() if deadline < now]:
                silent = TimeoutError(f"no answer for {self.timeout:g} s (rollouts.timeout)")
                self._replace(worker, out.pop(worker)[1], waiting, silent)

    def _hand_out(self, waiting: deque[Chunk], out: dict[int, tuple[float, Chunk | None]]) -> None:
        for worker in self._manager.actor_ids():
            if worker in out or (worker in self._ready and not waiting):
                continue
            if worker in self._ready:
                chunk = waiting.popleft()
                name, arguments = "generate", chunk[1]
            else:
                chunk, name, arguments = None, "load_adapter", {"version": self._held[0], "weights": self._weights}
            self._manager.foreach_actor_async(name, kwargs=arguments, remote_actor_ids=[worker], healthy_only=False)
            out[worker] = (time.monotonic() + self.timeout, chunk)

    def _replace(self, worker: int, chunk: Chunk | None, waiting: deque[Chunk], error: Exception) -> None:
        """Put a new worker in the place of a lost one, and its chunk back at the head of the queue."""
        ray.kill(self._manager.remove_actor(worker))
        self._ready.discard(worker)
        if chunk is not None:
            waiting.appendleft(chunk)
        self._losses += 1
        if self._losses > self._most_losses:
            raise RuntimeError(
                f"{self._losses} rollout workers were lost without an answer between: {error}"
            ) from error
        self._manager.add_actors([self._spawn()])
