"""A pool of Ray actors that may die."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import ray
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from policies.device import ComputeSettings
from policies.errors import UserError
from policies.files.adapters import tensor_digests, weights_digest
from policies.trunk import AdapterWeights
from rollouts.engine import Engine, Sampling
from rollouts.pool import split_chunks
from rollouts.roster import Order, Roster, WeightsVersion, WrongWeights
from rollouts.trajectory import Request, Trajectory
from rollouts.weight_transfer import groups, pack
from rollouts.worker import Reply, Worker

POLL = 0.005
"""Seconds that the pool waits for answers before it looks at the clock."""


class RayPool:
    """Workers that are handed chunks of a batch and answer as they are done (see `Roster`).

    What a chunk is made of does not depend on who takes it, so neither do the responses. A worker that dies, raises,
    answers under other weights or stays silent for `timeout` seconds is replaced; while one is slow, another is handed
    the same chunk. Responses that are given back before their end (see `Sampling.segment_tokens`) are a chunk again, which
    goes on under the weights that are current by then.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        workers: int,
        chunk: int,
        timeout: float,
        straggler_factor: float,
        computing: ComputeSettings,
        gpus: float,
    ) -> None:
        """build: makes the engine, in the worker's process. gpus: what each worker reserves."""
        self.chunk = chunk
        self.roster = Roster(timeout, straggler_factor)
        self._spawn = lambda: (
            ray.remote(Worker).options(num_cpus=1, num_gpus=gpus, max_restarts=0).remote(build, computing)
        )
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
        self._most_losses, self._losses = 3 * workers, 0
        self._bundles: dict[tuple[tuple[str, str], ...], ray.ObjectRef] = {}
        self.sent = 0
        """Bytes of the weights that went out last."""
        self._newer: deque[tuple[int, AdapterWeights]] = deque(maxlen=1)
        self._closed = False
        for _ in range(workers):
            self._start_worker()

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Let every worker use these weights before it serves again.

        They go through Ray's store, to each node once; what has not changed since the last time does not go again.
        """
        of_each, known, self._bundles, self.sent = tensor_digests(weights), self._bundles, {}, 0
        for names in groups(weights):
            content = tuple((name, of_each[name]) for name in names)
            if content not in known:
                bundle = pack(weights, names)
                known[content], self.sent = ray.put(bundle), self.sent + bundle.data.nbytes
            self._bundles[content] = known[content]
        self.roster.update_weights(WeightsVersion(version, weights_digest(of_each)))

    def update_weights(self, version: int, weights: AdapterWeights) -> None:
        """The same from another thread, while this one generates: what is handed out next is under these weights."""
        self._newer.append((version, weights))

    def wait(self) -> None:
        """Until every worker has confirmed the current weights."""
        while not self.roster.ready:
            self._advance()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        chunks = split_chunks(requests, self.chunk)
        places = split_chunks(range(len(requests)), self.chunk)
        self.roster.begin(len(chunks))
        done: dict[int, Trajectory] = {}
        while len(done) < len(requests):
            for index, trajectories in self._advance(chunks, sampling).items():
                answers = list(zip(places[index], trajectories, strict=True))
                done |= {place: t for place, t in answers if not sampling.is_unfinished(t)}
                if unfinished := [(place, t) for place, t in answers if sampling.is_unfinished(t)]:
                    places.append([place for place, _ in unfinished])
                    chunks.append([replace(t.request, partial_response=t) for _, t in unfinished])
                    self.roster.add()
        return [done[place] for place in range(len(requests))]

    def close(self) -> None:
        self._closed = True
        self.roster.retire()
        self._manager.clear()

    def _advance(
        self, chunks: Sequence[Sequence[Request]] = (), sampling: Sampling | None = None
    ) -> dict[int, list[Trajectory]]:
        """Carry out what is due, and take in what comes within a moment: the chunks that it answers, by their place."""
        if self._closed:
            raise RuntimeError("the pool of rollout workers is closed")
        if self._newer:
            self.load_adapter(*self._newer.pop())
        for order in self.roster.orders(time.monotonic()):
            if order.task is None:
                self._replace(order.worker, TimeoutError(order.why))
            else:
                self._hand_out(order, chunks, sampling)
        done: dict[int, list[Trajectory]] = {}
        for result in self._manager.fetch_ready_async_reqs(timeout_seconds=POLL):
            worker = result.actor_id
            if not result.ok:
                self.roster.lose(worker)
                self._replace(worker, result.get())
                continue
            reply: Reply = result.get()
            try:
                chunk = self.roster.reply(worker, reply.held, time.monotonic())
            except WrongWeights as error:
                self._replace(worker, error)
                continue
            self._losses = 0
            if chunk is not None:
                done[chunk] = reply.trajectories
        return done

    def _hand_out(self, order: Order, chunks: Sequence[Sequence[Request]], sampling: Sampling | None) -> None:
        task = order.task
        assert task is not None
        if task.chunk is None:
            name, arguments = "load_adapter", {"version": task.weights.version, "parcels": list(self._bundles.values())}
        else:
            name, arguments = "generate", {"requests": chunks[task.chunk], "sampling": sampling}
        self._manager.foreach_actor_async(name, kwargs=arguments, remote_actor_ids=[order.worker], healthy_only=False)

    def _replace(self, worker: int, error: Exception) -> None:
        """Put a new worker in the place of a lost one. What is the user's to mend would befall that one too."""
        if isinstance(error, UserError):
            raise error
        ray.kill(self._manager.remove_actor(worker))
        self._losses += 1
        if self._losses > self._most_losses:
            raise RuntimeError(
                f"{self._losses} rollout workers were lost without an answer between: {error}"
            ) from error
        self._start_worker()

    def _start_worker(self) -> None:
        self._manager.add_actors([self._spawn()])
        self.roster.join(self._manager.actor_ids()[-1])
