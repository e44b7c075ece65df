"""Stage three, PPO: the controller."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from align.algorithms.episodes import Episode, make_episodes
from align.algorithms.kl import KlCoefficient
from align.config.schema import LearnerSettings, PpoSettings
from align.data.datasets import Example
from align.learner.group import Learners
from align.learner.learner import Rates
from align.learner.schedules import schedule_factor
from align.ppo.mismatch import check_gap
from align.ppo.prompts import PromptStream, demonstration_batches, minibatch_orders
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import Answers, Asker
from rollouts.engine import Sampling
from rollouts.trajectory import Scored, Trajectory


@dataclass
class Step:
    """What one round of rollout and update produced: all that is logged of it. `index` counts from 0."""

    index: int
    trajectories: list[Trajectory]
    scored: list[Scored]
    episodes: list[Episode]
    rates: Rates
    kl_coefficient: float
    statistics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Asked:
    """A batch that is being answered: for which step, under which weights."""

    step: int
    version: int
    weights: AdapterWeights
    answers: Answers


@dataclass
class Ppo:
    """The parts of the loop, each chosen before it starts, and its state.

    step: the next. asked: the batches of the steps to come that are being answered, `max_age` of them when a step ends.
    """

    prompts: PromptStream
    asker: Asker
    learners: Learners
    score: Callable[[Sequence[Trajectory]], list[Scored]]
    kl: KlCoefficient
    sampling: Sampling
    ppo: PpoSettings
    learner: LearnerSettings
    seed: int
    demonstrations: Sequence[Example] = ()
    max_age: int = 0
    step: int = 0
    asked: deque[Asked] = field(default_factory=deque)

    def steps(self) -> Iterator[Step]:
        """Run the steps that are left.

        prompts → trajectories → scores → advantages → update → adapter weights, version n + 1
        """
        ppo = self.ppo
        weights = self.learners.policy_weights()
        before = time.perf_counter()
        while self.step < ppo.steps:
            clock, index, beta = Clock(before), self.step, self.kl.value
            rates = learning_rates(self.learner, ppo, index, beta)
            orders = minibatch_orders(ppo.batch, ppo.minibatches, ppo.epochs, self.seed, index)
            mixed_in = demonstration_batches(self.demonstrations, ppo, self.seed, index)
            with clock("rollout"):
                for step in range(index + len(self.asked), min(index + self.max_age + 1, ppo.steps)):
                    self.ask(step, index, weights)
                trajectories = self.asked.popleft().answers()
            with clock("score"):
                scored = self.score(trajectories)
                check_gap(trajectories, scored, ppo.max_gap)
                episodes = make_episodes(trajectories, scored, ppo, beta)
            with clock("update"):
                statistics = self.learners.update(episodes, orders, rates, mixed_in)
            with clock("sync"):
                weights = self.learners.policy_weights()
            self.kl.update(sum(verdict.kl for verdict in scored) / len(scored), len(scored))
            self.step += 1
            seconds = clock.seconds()
            before = time.perf_counter()
            yield Step(index, trajectories, scored, episodes, rates, beta, statistics, seconds)

    def ask(self, step: int, version: int, weights: AdapterWeights) -> None:
        """Have a step's prompts answered under these weights."""
        answers = self.asker.ask(version, weights, self.prompts.requests(step), self.sampling)
        self.asked.append(Asked(step, version, weights, answers))


def learning_rates(learner: LearnerSettings, ppo: PpoSettings, index: int, kl_coefficient: float) -> Rates:
    """What a step trains with. While the critic warms up alone, the policy's rate is 0."""
    factor = schedule_factor(learner.schedule, index, ppo.steps, learner.warmup)
    policy = 0.0 if index < ppo.critic.warmup else learner.policy_learning_rate
    return Rates(
        policy=policy * factor,
        critic=learner.critic_learning_rate * factor,
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
