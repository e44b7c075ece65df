"""Which workers may serve, what each is doing, and what is to be done next: states and transitions, and nothing else.

No clock, no actor and no weights: the pool tells what happened and when, and carries out the orders.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median


class State(StrEnum):
    """What is known of a worker. A dead one stays so: what takes its place is another worker, which starts."""

    STARTING = "starting"
    """It has not confirmed any weights yet."""
    STALE = "stale"
    """It runs, under weights that are not the current ones."""
    HEALTHY = "healthy"
    """It has confirmed the current weights: it alone is handed prompts."""
    SUSPECT = "suspect"
    """It takes far longer than others do: they are handed its prompts too, and whoever answers first counts."""
    DEAD = "dead"
    """It failed, was silent for too long, or answered under other weights than it was asked to."""
    RETIRED = "retired"
    """It was let go."""


class Event(StrEnum):
    """What may befall a worker."""

    RENEWED = "the current weights are others now"
    CONFIRMED = "it holds the current weights"
    OUTDATED = "it holds weights that were current when it was asked"
    LATE = "it takes far longer than others"
    LOST = "it failed, or is given up"
    RETIRED = "it is let go"


_GONE = {Event.LOST: State.DEAD, Event.RETIRED: State.RETIRED}
TRANSITIONS: dict[State, dict[Event, State]] = {
    State.STARTING: {
        Event.RENEWED: State.STARTING,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_GONE,
    },
    State.STALE: {
        Event.RENEWED: State.STALE,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_GONE,
    },
    State.HEALTHY: {
        Event.RENEWED: State.STALE,
        Event.CONFIRMED: State.HEALTHY,
        Event.LATE: State.SUSPECT,
        **_GONE,
    },
    State.SUSPECT: {
        Event.RENEWED: State.SUSPECT,
        Event.CONFIRMED: State.HEALTHY,
        Event.OUTDATED: State.STALE,
        **_GONE,
    },
    State.DEAD: {},
    State.RETIRED: {},
}
"""A worker that is stale, or starts, becomes healthy by confirming the current weights and in no other way."""


@dataclass(frozen=True)
class WeightsVersion:
    """The name of adapter weights: their version, and the fingerprint of their bytes."""

    version: int
    digest: str


@dataclass(frozen=True)
class Task:
    """What a worker was asked to do, and under which weights: to load them, or to answer a chunk of a batch."""

    weights: WeightsVersion
    batch: int = 0
    chunk: int | None = None
    """Its place in the batch; None: load the weights."""


@dataclass
class Member:
    """A worker, as the roster knows it. since: when its task was handed out, in seconds."""

    state: State = State.STARTING
    task: Task | None = None
    since: float = 0.0


@dataclass(frozen=True)
class Order:
    """What the pool is to do: hand a task to a worker, or, where there is none, put another in its place."""

    worker: int
    task: Task | None
    why: str = ""


@dataclass
class Roster:
    """The workers of a pool and the chunks of the batch at hand.

    timeout: seconds after which a worker that has not answered is given up. straggler_factor: it is suspect after so many times
    the median of what the last chunks took.
    """

    timeout: float
    straggler_factor: float
    members: dict[int, Member] = field(default_factory=dict)
    weights: WeightsVersion | None = None
    batch: int = 0
    chunks: int = 0
    waiting: deque[int] = field(default_factory=deque)
    answered: set[int] = field(default_factory=set)
    took: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    def join(self, worker: int) -> None:
        """A new worker starts."""
        self.members[worker] = Member()

    def update_weights(self, weights: WeightsVersion) -> None:
        """These are the current weights from now on: nobody serves before it has confirmed them."""
        if weights == self.weights:
            return
        self.weights = weights
        for member in self.members.values():
            _move(member, Event.RENEWED)

    def begin(self, chunks: int) -> None:
        """A new batch of so many chunks; what is still being made of the one before is of no use any more."""
        self.batch, self.chunks = self.batch + 1, chunks
        self.waiting, self.answered = deque(range(chunks)), set()

    def add(self) -> None:
        """One chunk more of the batch at hand, behind the others."""
        self.waiting.append(self.chunks)
        self.chunks += 1

    @property
    def ready(self) -> bool:
        """Whether every worker holds the current weights."""
        return all(member.state == State.HEALTHY for member in self.members.values())

    def orders(self, now: float) -> list[Order]:
        """What is to be done at this time: each order is as good as carried out, and not given twice."""
        return [*self._give_up(now), *self._hand_out(now)]

    def reply(self, worker: int, held: WeightsVersion, now: float) -> int | None:
        """A worker has done its task, under the weights that it names.

        Returns the chunk that it has answered, where that is wanted. Raises WrongWeights where the weights are others
        than it was asked to use: it is lost then.
        """
        member = self.members[worker]
        task, member.task = member.task, None
        assert task is not None
        if held != task.weights:
            self.lose(worker, task)
            raise WrongWeights(f"it holds {_name(held)} and not {_name(task.weights)}")
        _move(member, Event.CONFIRMED if held == self.weights else Event.OUTDATED)
        if task.chunk is None or task.batch != self.batch or task.chunk in self.answered:
            return None
        self.took.append(now - member.since)
        self.answered.add(task.chunk)
        return task.chunk

    def lose(self, worker: int, task: Task | None = None) -> None:
        """A worker is dead; its chunk goes to another, before all others, unless another has it already."""
        member = self.members.pop(worker)
        task = task or member.task
        _move(member, Event.LOST)
        if task and task.chunk is not None and task.batch == self.batch and self._unheld(task.chunk):
            self.waiting.appendleft(task.chunk)

    def retire(self) -> None:
        """Let all workers go."""
        for member in self.members.values():
            _move(member, Event.RETIRED)
        self.members.clear()

    def _give_up(self, now: float) -> Iterator[Order]:
        for worker, member in list(self.members.items()):
            if member.task is None:
                continue
            if now - member.since > self.timeout:
                starting = member.state == State.STARTING
                what = "did not start: has the Ray cluster a CPU, and GPUs, for it?" if starting else "gave no answer"
                self.lose(worker)
                yield Order(worker, None, f"after {self.timeout:g} s (rollouts.timeout) one {what}")
            elif (
                member.state == State.HEALTHY
                and self.took
                and now - member.since > self.straggler_factor * median(self.took)
            ):
                _move(member, Event.LATE)

    def _hand_out(self, now: float) -> Iterator[Order]:
        for worker, member in self.members.items():
            if member.task is not None or self.weights is None:
                continue
            if member.state != State.HEALTHY:
                task = Task(self.weights)
            elif (chunk := self._next_chunk()) is not None:
                task = Task(self.weights, self.batch, chunk)
            else:
                continue
            member.task, member.since = task, now
            yield Order(worker, task)

    def _next_chunk(self) -> int | None:
        """One that nobody has; then one that only a suspect has."""
        if self.waiting:
            return self.waiting.popleft()
        held = [m for m in self.members.values() if m.task and m.task.batch == self.batch]
        late = {m.task.chunk for m in held if m.task and m.state == State.SUSPECT and m.task.chunk is not None}
        timely = {m.task.chunk for m in held if m.task and m.state != State.SUSPECT}
        return min(late - timely - self.answered, default=None)

    def _unheld(self, chunk: int) -> bool:
        if chunk in self.answered or chunk in self.waiting:
            return False
        tasks = [member.task for member in self.members.values()]
        return not any(task and (task.batch, task.chunk) == (self.batch, chunk) for task in tasks)


class WrongWeights(RuntimeError):
    """A worker used other weights than it was asked to."""


def _move(member: Member, event: Event) -> None:
    member.state = TRANSITIONS[member.state][event]


def _name(weights: WeightsVersion) -> str:
    return f"version {weights.version} ({weights.digest[:8]})"
