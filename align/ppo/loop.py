"""Stage three, PPO: the controller."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from align.algorithms.episodes import Episode, make_episodes
from align.algorithms.kl import KlCoefficient
from align.config.schema import LearnerSettings, PpoSettings
from align.data.datasets import TokenizedDemonstration
from align.learner.group import Learners
from align.learner.learner import StepCoefficients
from align.learner.schedules import schedule_factor
from align.ppo.mismatch import check_mismatch
from align.ppo.prompts import PromptStream, demonstration_batches, minibatch_orders
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import RolloutSource, TrajectoriesFuture
from rollouts.engine import Sampling
from rollouts.trajectory import RoleOutputs, Trajectory


@dataclass
class Step:
    """What one round of rollout and update produced: all that is logged of it. `index` counts from 0."""

    index: int
    trajectories: list[Trajectory]
    scored: list[RoleOutputs]
    episodes: list[Episode]
    coefficients: StepCoefficients
    kl_coefficient: float
    statistics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class PendingBatch:
    """A batch that is being answered: for which step, under which weights."""

    step: int
    version: int
    weights: AdapterWeights
    answers: TrajectoriesFuture


@dataclass
class Ppo:
    """The parts of the loop, each chosen before it starts, and its state.

    step: the next. pending: the batches of the steps to come that are being answered, `max_staleness` of them when a step ends.
    """

    prompts: PromptStream
    rollouts: RolloutSource
    learners: Learners
    score: Callable[[Sequence[Trajectory]], list[RoleOutputs]]
    kl: KlCoefficient
    sampling: Sampling
    ppo: PpoSettings
    learner: LearnerSettings
    seed: int
    demonstrations: Sequence[TokenizedDemonstration] = ()
    max_staleness: int = 0
    step: int = 0
    pending: deque[PendingBatch] = field(default_factory=deque)

    def steps(self) -> Iterator[Step]:
        """Run the steps that are left.

        prompts → trajectories → scores → advantages → update → adapter weights, version n + 1
        """
        ppo = self.ppo
        weights = self.learners.policy_weights()
        before = time.perf_counter()
        while self.step < ppo.steps:
            clock, index, beta = Clock(before), self.step, self.kl.value
            coefficients = step_coefficients(self.learner, ppo, index, beta)
            orders = minibatch_orders(ppo.batch_size, ppo.minibatches, ppo.epochs, self.seed, index)
            mixed_in = demonstration_batches(self.demonstrations, ppo, self.seed, index)
            with clock("rollout"):
                for step in range(index + len(self.pending), min(index + self.max_staleness + 1, ppo.steps)):
                    self.submit(step, index, weights)
                trajectories = self.pending.popleft().answers()
            with clock("score"):
                scored = self.score(trajectories)
                check_mismatch(trajectories, scored, ppo.max_mismatch)
                episodes = make_episodes(trajectories, scored, ppo, beta)
            with clock("update"):
                statistics = self.learners.update(episodes, orders, coefficients, mixed_in)
            with clock("sync"):
                weights = self.learners.policy_weights()
            self.kl.update(sum(output.kl for output in scored) / len(scored), len(scored))
            self.step += 1
            seconds = clock.seconds()
            before = time.perf_counter()
            yield Step(index, trajectories, scored, episodes, coefficients, beta, statistics, seconds)

    def submit(self, step: int, version: int, weights: AdapterWeights) -> None:
        """Have a step's prompts answered under these weights."""
        answers = self.rollouts.submit(version, weights, self.prompts.requests(step), self.sampling)
        self.pending.append(PendingBatch(step, version, weights, answers))


def step_coefficients(
    learner: LearnerSettings, ppo: PpoSettings, index: int, kl_coefficient: float
) -> StepCoefficients:
    """What a step trains with. While the critic warms up alone, the policy's rate is 0."""
    factor = schedule_factor(learner.schedule, index, ppo.steps, learner.warmup)
    policy = 0.0 if index < ppo.critic.warmup else learner.policy_learning_rate
    return StepCoefficients(
        policy_lr=policy * factor,
        critic_lr=learner.critic_learning_rate * factor,
        kl_in_loss=kl_coefficient if ppo.kl.where == "loss" else 0.0,
    )


class Clock:
    """Seconds by part of one step. What went by before it, since the last step's end, is the part `between`."""

    def __init__(self, before: float) -> None:
        self._start = time.perf_counter()
        self._parts = {"between": self._start - before}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._parts[part] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, and of all since the start as `step`."""
        return self._parts | {"step": time.perf_counter() - self._start}
