"""A pool of Ray actors, which replaces those that die."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.rllib.utils.actor_manager import FaultTolerantActorManager

from policies.device import ActorOptions
from policies.errors import ActorError, UserError, actor_failure, first_line
from policies.files.adapters import tensor_digests, weights_digest
from policies.trunk import AdapterWeights
from rollouts.engine import Engine, Sampling
from rollouts.pool import split_chunks
from rollouts.roster import Command, Roster, Task, WeightsVersion, WrongWeights
from rollouts.trajectory import Request, Trajectory
from rollouts.weight_transfer import bundle_names, pack
from rollouts.worker import Reply, Worker

POLL_SECONDS = 0.005
"""How long the pool waits for replies before it looks at the clock again."""

ROOM_SECONDS = 1.0
"""How often a pool without a running worker asks whether there is room for one."""

LOSSES_PER_WORKER = 3
"""Workers lost per worker of the pool, without a reply in between, before the pool gives up: the fault is then not that
of a single machine."""

BundleContent = tuple[tuple[str, str], ...]
"""What is in a bundle: name and digest of each tensor."""


@dataclass(frozen=True)
class PoolSettings:
    """The size of the chunks of a pool of Ray actors, and when it replaces them.

    Args:
        chunk_size: Requests that a worker is handed at a time.
        timeout: Seconds after which a worker that has not replied is replaced.
        straggler_factor: Multiple of the median duration of recent chunks after which a chunk is also handed to another
            worker.
    """

    chunk_size: int
    timeout: float
    straggler_factor: float


class RayPool:
    """Hands the chunks of a batch to workers, and collects them as they are done (see `Roster`).

    Chunks do not depend on which worker takes them, so neither do the responses. A worker that dies, raises, uses other
    weights or does not reply in time is replaced; the chunk of a slow one is also handed to another. Responses that are
    returned unfinished (see `Sampling.segment_tokens`) form a new chunk, which continues with the weights that are
    current by then.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        settings: PoolSettings,
        actors: Sequence[ActorOptions],
        await_room: Callable[[], None] | None = None,
    ) -> None:
        """Start the workers, each with its own engine. Ray must be initialized.

        Args:
            build: Makes the engine, in the worker's process.
            settings: The size of chunks, and when workers are replaced.
            actors: How each worker is started, and how it computes.
            await_room: Called every second while no worker runs. It returns once the cluster has room for all workers,
                and raises where it has none for long; None: there is always room.
        """
        self.settings = settings
        self.roster = Roster(settings.timeout, settings.straggler_factor)
        self.sent_bytes = 0
        """Bytes of the weights that the last `load_adapter` sent."""
        self.peak_memory: int | None = None
        self._build = build
        self._manager = FaultTolerantActorManager(max_remote_requests_in_flight_per_actor=1)
        self._options: dict[int, ActorOptions] = {}
        self._losses = 0
        self._await_room = await_room
        self._looked_for_room = time.monotonic()
        self._bundles: dict[BundleContent, ray.ObjectRef] = {}
        self._update: deque[tuple[int, AdapterWeights]] = deque(maxlen=1)
        self._closed = False
        for actor in actors:
            self._start_worker(actor)

    def load_adapter(self, version: int, weights: AdapterWeights) -> None:
        """Have every worker use these weights before it serves again.

        They are sent through Ray's object store, once per node; bundles that have not changed are not sent again.

        Args:
            version: The version that new tokens carry.
            weights: The tensors of the adapter by name.
        """
        digests = tensor_digests(weights)
        sent = self._bundles
        self._bundles = {}
        self.sent_bytes = 0
        for names in bundle_names(weights):
            content = tuple((name, digests[name]) for name in names)
            if content not in sent:
                bundle = pack(weights, names)
                sent[content] = ray.put(bundle)
                self.sent_bytes += bundle.data.nbytes
            self._bundles[content] = sent[content]
        self.roster.update_weights(WeightsVersion(version, weights_digest(digests)))

    def update_weights(self, version: int, weights: AdapterWeights) -> None:
        """Use these weights for every chunk handed out from now on; safe to call while another thread generates."""
        self._update.append((version, weights))

    def wait(self) -> None:
        """Wait until every worker has confirmed the current weights."""
        while not self.roster.ready:
            self._advance()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request.

        Args:
            requests: The prompts, each with its own seed.
            sampling: How the responses are drawn.

        Returns:
            One trajectory per request, in the same order.

        Raises:
            UserError: A worker failed because of the user's settings or files.
            ActorError: Too many workers were lost in a row.
            Exception: `await_room` has raised it.
            RuntimeError: The pool is closed.
        """
        batch = _Batch(requests, sampling, self.settings.chunk_size)
        self.roster.start_batch(len(batch.chunks))
        while not batch.done:
            for chunk, trajectories in self._advance(batch).items():
                if batch.receive(chunk, trajectories):
                    self.roster.add_chunk()
        return batch.trajectories()

    def close(self) -> None:
        """End all workers. A `generate` in another thread raises RuntimeError."""
        self._closed = True
        self.roster.retire()
        self._manager.clear()

    def _advance(self, batch: "_Batch | None" = None) -> dict[int, list[Trajectory]]:
        """Carry out commands that are due, and wait briefly for replies. Returns trajectories by completed chunk."""
        if self._closed:
            raise RuntimeError("the pool of rollout workers is closed")
        if self._update:
            version, weights = self._update.pop()
            self.load_adapter(version, weights)
        if self._await_room and not self.roster.staffed and time.monotonic() - self._looked_for_room > ROOM_SECONDS:
            self._await_room()
            self._looked_for_room = time.monotonic()
        for command in self.roster.commands(time.monotonic()):
            self._carry_out(command, batch)
        completed: dict[int, list[Trajectory]] = {}
        for result in self._manager.fetch_ready_async_reqs(timeout_seconds=POLL_SECONDS):
            reply = self._reply(result.actor_id, result.ok, result.get())
            if reply is not None:
                chunk, trajectories = reply
                completed[chunk] = trajectories
        return completed

    def _reply(self, worker: int, ok: bool, content: Any) -> tuple[int, list[Trajectory]] | None:
        """The chunk that a worker has completed, with its trajectories; None where there is none, or it was lost."""
        if not ok:
            self.roster.lose(worker)
            self._replace(worker, content)
            return None
        reply: Reply = content
        try:
            chunk = self.roster.receive_reply(worker, reply.loaded, time.monotonic())
        except WrongWeights as error:
            self._replace(worker, error)
            return None
        self._losses = 0
        if reply.peak_memory is not None:
            self.peak_memory = max(self.peak_memory or 0, reply.peak_memory)
        return None if chunk is None else (chunk, reply.trajectories)

    def _carry_out(self, command: Command, batch: "_Batch | None") -> None:
        if command.task is None:
            self._replace(command.worker, TimeoutError(command.reason))
            return
        name, arguments = self._call_for(command.task, batch)
        self._manager.foreach_actor_async(name, kwargs=arguments, remote_actor_ids=[command.worker], healthy_only=False)

    def _call_for(self, task: Task, batch: "_Batch | None") -> tuple[str, dict[str, Any]]:
        """The worker's method, and its arguments, that do a task."""
        if task.chunk is None:
            return "load_adapter", {"version": task.weights.version, "bundles": list(self._bundles.values())}
        assert batch is not None
        return "generate", {"requests": batch.chunks[task.chunk], "sampling": batch.sampling}

    def _replace(self, worker: int, error: Exception) -> None:
        """Start a new worker in place of a lost one. A UserError is raised instead: it would occur again."""
        if isinstance(error, RayTaskError):
            error = actor_failure(error, "a rollout worker")
        if isinstance(error, UserError):
            raise error
        ray.kill(self._manager.remove_actor(worker))
        self._losses += 1
        if self._losses > LOSSES_PER_WORKER * len(self._options):
            raise ActorError(
                f"{self._losses} rollout workers were lost without a reply in between: {first_line(error)}"
            ) from error
        self._start_worker(self._options.pop(worker))

    def _start_worker(self, actor: ActorOptions) -> None:
        """Start a worker; one that replaces another has the place of the other."""
        started = ray.remote(Worker).options(**actor.options, max_restarts=0).remote(self._build, actor.compute)
        self._manager.add_actors([started])
        worker = self._manager.actor_ids()[-1]
        self._options[worker] = actor
        self.roster.add_worker(worker)


@dataclass
class _Batch:
    """The requests of a batch in chunks, and the trajectories that are finished so far.

    Attributes:
        requests: All requests of the batch.
        sampling: How the responses are drawn.
        chunk_size: Requests per chunk.
        chunks: The requests of each chunk; continued responses form further chunks.
        positions: For each chunk, the positions of its requests in the batch.
        finished: The finished trajectories by position in the batch.
    """

    requests: Sequence[Request]
    sampling: Sampling
    chunk_size: int
    chunks: list[Sequence[Request]] = field(init=False)
    positions: list[Sequence[int]] = field(init=False)
    finished: dict[int, Trajectory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chunks = split_chunks(self.requests, self.chunk_size)
        self.positions = split_chunks(range(len(self.requests)), self.chunk_size)

    @property
    def done(self) -> bool:
        return len(self.finished) == len(self.requests)

    def receive(self, chunk: int, trajectories: Sequence[Trajectory]) -> bool:
        """Take in the trajectories of a chunk. Returns whether its unfinished ones now form another chunk."""
        positions: list[int] = []
        requests: list[Request] = []
        for position, trajectory in zip(self.positions[chunk], trajectories, strict=True):
            if self.sampling.is_unfinished(trajectory):
                positions.append(position)
                requests.append(replace(trajectory.request, partial_response=trajectory))
            else:
                self.finished[position] = trajectory
        if not requests:
            return False
        self.positions.append(positions)
        self.chunks.append(requests)
        return True

    def trajectories(self) -> list[Trajectory]:
        """All trajectories, in the order of the requests."""
        return [self.finished[position] for position in range(len(self.requests))]
