"""Which workers may serve, what each is doing, and what to do next: states and transitions, and nothing else.

It has no clock, no actors and no weights: the pool reports what happened and when, and carries out the commands.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median

RECENT_CHUNKS = 32
"""Chunks whose durations are kept for the median: enough to be stable, few enough to follow longer responses."""


class State(StrEnum):
    """What is known of a worker. DEAD and RETIRED are final: a replacement is a new worker, which starts."""

    STARTING = "starting"
    """It has not confirmed any weights yet."""
    STALE = "stale"
    """It is running, with weights that are not the current ones."""
    HEALTHY = "healthy"
    """It has confirmed the current weights. Only healthy workers are given prompts."""
    SUSPECT = "suspect"
    """It takes far longer than the others: its chunk is also given to another worker, and the first reply counts."""
    DEAD = "dead"
    """It failed, did not reply in time, or used other weights than it was told to."""
    RETIRED = "retired"
    """The pool was closed."""


class Event(StrEnum):
    """What can happen to a worker."""

    WEIGHTS_CHANGED = "there are new current weights"
    CONFIRMED = "it has loaded the current weights"
    OUTDATED = "it has loaded weights that were current when its task was given"
    SLOW = "it takes far longer than the others"
    LOST = "it failed, or was given up"
    RETIRED = "the pool is closed"


_LEAVING = {Event.LOST: State.DEAD, Event.RETIRED: State.RETIRED}
TRANSITIONS: dict[State, dict[Event, State]] = {
    State.STARTING: {
        Event.WEIGHTS_CHANGED: State.STARTING,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_LEAVING,
    },
    State.STALE: {
        Event.WEIGHTS_CHANGED: State.STALE,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_LEAVING,
    },
    State.HEALTHY: {
        Event.WEIGHTS_CHANGED: State.STALE,
        Event.CONFIRMED: State.HEALTHY,
        Event.SLOW: State.SUSPECT,
        **_LEAVING,
    },
    State.SUSPECT: {
        Event.WEIGHTS_CHANGED: State.SUSPECT,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_LEAVING,
    },
    State.DEAD: {},
    State.RETIRED: {},
}
"""A worker becomes healthy by confirming the current weights, and in no other way."""


@dataclass(frozen=True)
class WeightsVersion:
    """Identifies adapter weights by their version and the digest of their bytes."""

    version: int
    digest: str

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest[:8]})"


@dataclass(frozen=True)
class Task:
    """What a worker is to do with which weights: load them, or generate a chunk of a batch.

    chunk: The index of the chunk in the batch; None: load the weights.
    """

    weights: WeightsVersion
    batch: int = 0
    chunk: int | None = None


@dataclass
class Member:
    """A worker as the roster knows it.

    Attributes:
        state: What is known of it.
        task: What it is doing; None where it is idle.
        started: When it was given its task, in seconds.
    """

    state: State = State.STARTING
    task: Task | None = None
    started: float = 0.0


@dataclass(frozen=True)
class Command:
    """What the pool is to do: give a worker a task, or, without a task, replace the worker for this reason."""

    worker: int
    task: Task | None
    reason: str = ""


@dataclass
class Roster:
    """The workers of a pool and the chunks of the current batch.

    Args:
        timeout: Seconds after which a worker that has not replied is given up.
        straggler_factor: Multiple of the median duration of recent chunks after which a worker is suspect.
        members: The workers by id.
        weights: The current weights; None before the first update.
        batch: Number of the current batch.
        chunk_count: Chunks of the current batch, including those added later.
        waiting: Chunks that no worker has been given, in order.
        completed: Chunks whose trajectories have been received.
        durations: Seconds that recent chunks took.
    """

    timeout: float
    straggler_factor: float
    members: dict[int, Member] = field(default_factory=dict)
    weights: WeightsVersion | None = None
    batch: int = 0
    chunk_count: int = 0
    waiting: deque[int] = field(default_factory=deque)
    completed: set[int] = field(default_factory=set)
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_CHUNKS))

    def add_worker(self, worker: int) -> None:
        """Register a new worker, which starts."""
        self.members[worker] = Member()

    def update_weights(self, weights: WeightsVersion) -> None:
        """Make these the current weights: no worker serves before it has confirmed them."""
        if weights == self.weights:
            return
        self.weights = weights
        for member in self.members.values():
            _transition(member, Event.WEIGHTS_CHANGED)

    def start_batch(self, chunk_count: int) -> None:
        """Start a batch of this many chunks; replies to an earlier batch no longer count."""
        self.batch += 1
        self.chunk_count = chunk_count
        self.waiting = deque(range(chunk_count))
        self.completed = set()

    def add_chunk(self) -> None:
        """Add a chunk to the current batch, after all others."""
        self.waiting.append(self.chunk_count)
        self.chunk_count += 1

    @property
    def staffed(self) -> bool:
        """Whether a worker is running, with whatever weights."""
        return any(member.state != State.STARTING for member in self.members.values())

    @property
    def ready(self) -> bool:
        """Whether every worker has confirmed the current weights."""
        return all(member.state == State.HEALTHY for member in self.members.values())

    def commands(self, now: float) -> list[Command]:
        """What the pool is to do at this time, in seconds. Each command is given once and taken to be carried out."""
        return [*self._replacements(now), *self._assignments(now)]

    def receive_reply(self, worker: int, loaded: WeightsVersion, now: float) -> int | None:
        """Record that a worker has completed its task.

        Args:
            worker: The worker.
            loaded: The weights that it reports to have loaded.
            now: The time in seconds.

        Returns:
            The index of the chunk that it has generated, or None where the reply is not needed: it loaded weights, the
            batch is over, or another worker was faster.

        Raises:
            WrongWeights: It used other weights than it was told to; it is dead then.
        """
        member = self.members[worker]
        task = member.task
        assert task is not None
        if loaded != task.weights:
            self.lose(worker)
            raise WrongWeights(f"it has loaded {loaded} instead of {task.weights}")
        member.task = None
        _transition(member, Event.CONFIRMED if loaded == self.weights else Event.OUTDATED)
        if task.chunk is None or task.batch != self.batch or task.chunk in self.completed:
            return None
        self.durations.append(now - member.started)
        self.completed.add(task.chunk)
        return task.chunk

    def lose(self, worker: int) -> None:
        """Record that a worker is dead. Its chunk is the next to be handed out, unless another worker has it too."""
        member = self.members.pop(worker)
        _transition(member, Event.LOST)
        task = member.task
        if task and task.chunk is not None and task.batch == self.batch and self._is_unassigned(task.chunk):
            self.waiting.appendleft(task.chunk)

    def retire(self) -> None:
        """Retire all workers."""
        for member in self.members.values():
            _transition(member, Event.RETIRED)
        self.members.clear()

    def _replacements(self, now: float) -> Iterator[Command]:
        """Give up workers that did not reply in time, and mark slow ones as suspect."""
        for worker, member in list(self.members.items()):
            if member.task is None:
                continue
            seconds = now - member.started
            if seconds > self.timeout:
                reason = self._timeout_reason(member.state)
                self.lose(worker)
                yield Command(worker, None, reason)
            elif self._is_slow(member, seconds):
                _transition(member, Event.SLOW)

    def _timeout_reason(self, state: State) -> str:
        problem = "did not reply"
        if state == State.STARTING:
            problem = "did not start: does the Ray cluster have a CPU, and GPUs, for it?"
        return f"after {self.timeout:g} s (rollouts.timeout) a worker {problem}"

    def _is_slow(self, member: Member, seconds: float) -> bool:
        if member.state != State.HEALTHY or not self.durations:
            return False
        return seconds > self.straggler_factor * median(self.durations)

    def _assignments(self, now: float) -> Iterator[Command]:
        """Give each idle worker a task: load the weights, or a chunk if there is one."""
        if self.weights is None:
            return
        for worker, member in self.members.items():
            if member.task is not None:
                continue
            if member.state == State.HEALTHY:
                chunk = self._next_chunk()
                if chunk is None:
                    continue
                task = Task(self.weights, self.batch, chunk)
            else:
                task = Task(self.weights)
            member.task = task
            member.started = now
            yield Command(worker, task)

    def _next_chunk(self) -> int | None:
        """The next waiting chunk; where there is none, the first that only suspect workers have."""
        if self.waiting:
            return self.waiting.popleft()
        suspected: set[int] = set()
        in_time: set[int] = set()
        for member in self.members.values():
            if member.task and member.task.batch == self.batch and member.task.chunk is not None:
                chunks = suspected if member.state == State.SUSPECT else in_time
                chunks.add(member.task.chunk)
        return min(suspected - in_time - self.completed, default=None)

    def _is_unassigned(self, chunk: int) -> bool:
        """Whether a chunk is neither completed nor waiting, and no worker has it."""
        if chunk in self.completed or chunk in self.waiting:
            return False
        tasks = [member.task for member in self.members.values()]
        return not any(task and task.batch == self.batch and task.chunk == chunk for task in tasks)


class WrongWeights(RuntimeError):
    """A worker used other weights than it was told to."""


def _transition(member: Member, event: Event) -> None:
    member.state = TRANSITIONS[member.state][event]
