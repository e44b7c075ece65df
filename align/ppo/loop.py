"""The controller of PPO.

prompts → trajectories → role outputs and scores → advantages → update → weights of version n + 1
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from align.algorithms.episodes import Episode, make_episodes
from align.algorithms.kl import KlCoefficient
from align.config.ppo_settings import PpoSettings
from align.config.schema import LearnerSettings
from align.data.examples import TokenizedDemonstration
from align.learner.schedules import schedule_factor
from align.ppo.learner import StepCoefficients
from align.ppo.learners import PpoLearners
from align.ppo.mismatch import MismatchCheck
from align.ppo.prompts import PromptStream, demonstration_batches, minibatch_orders
from align.runtime.signals import StopRequest
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import RolloutSource, TrajectoriesFuture
from rollouts.engine import Sampling
from rollouts.trajectory import RoleOutputs, Trajectory


@dataclass(frozen=True)
class Step:
    """The results of one step of rollout and update.

    Attributes:
        index: Index of the step, from 0.
        trajectories: The sampled responses.
        scored: The role outputs of each trajectory, with its score.
        episodes: The episodes that were trained on.
        coefficients: Learning rates, and the weight of the KL in the loss.
        kl_coefficient: Weight of the KL, in the reward or in the loss.
        logit_spacing: Unit of the mismatch, in nats, see `MismatchCheck`.
        statistics: Statistics of the update, see `PpoLearner.update`.
        seconds: Seconds by part of the step, see `Clock`.
    """

    index: int
    trajectories: list[Trajectory]
    scored: list[RoleOutputs]
    episodes: list[Episode]
    coefficients: StepCoefficients
    kl_coefficient: float
    logit_spacing: float
    statistics: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class PendingBatch:
    """A batch that is being generated.

    Attributes:
        step: The step that will train on it.
        version: Version of the weights that it was submitted with.
        weights: The policy's adapter of this version.
        trajectories: The future: waits for the batch and returns it.
    """

    step: int
    version: int
    weights: AdapterWeights
    trajectories: TrajectoriesFuture


@dataclass
class Ppo:
    """The parts of the loop, all chosen before it starts, and its state.

    Attributes:
        prompts: The requests of each step.
        rollouts: Generates the trajectories of a step.
        learners: Train the policy and the critic.
        score: Computes role outputs and scores of a batch.
        kl: The KL coefficient.
        mismatch: Checks the sampler against the learner at every step.
        sampling: How responses are sampled.
        ppo: The settings of PPO.
        learner: The settings of the learner.
        seed: Seed of the run.
        demonstrations: The demonstrations for ptx.
        max_staleness: How many steps ahead of the update batches are submitted.
        stop: Interrupts a step whose update has not begun.
        step: The next step, from 0.
        pending: Batches of later steps that are being generated; `max_staleness` of them when a step ends.
    """

    prompts: PromptStream
    rollouts: RolloutSource
    learners: PpoLearners
    score: Callable[[Sequence[Trajectory]], list[RoleOutputs]]
    kl: KlCoefficient
    mismatch: MismatchCheck
    sampling: Sampling
    ppo: PpoSettings
    learner: LearnerSettings
    seed: int
    demonstrations: Sequence[TokenizedDemonstration] = ()
    max_staleness: int = 0
    stop: StopRequest = field(default_factory=StopRequest)
    step: int = 0
    pending: deque[PendingBatch] = field(default_factory=deque)

    def steps(self) -> Iterator[Step]:
        """Run the remaining steps, one at a time.

        Raises:
            KeyboardInterrupt: A signal requested a stop before the update of a step had begun, see `StopRequest`.
        """
        ppo = self.ppo
        weights = self.learners.policy_weights()
        previous_end = time.perf_counter()
        while self.step < ppo.steps:
            clock = Clock(previous_end)
            index = self.step
            kl_coefficient = self.kl.value
            coefficients = step_coefficients(self.learner, ppo, index, kl_coefficient)
            orders = minibatch_orders(ppo, self.seed, index)
            demonstrations = demonstration_batches(self.demonstrations, ppo, self.seed, index)
            with self.stop.droppable():
                with clock("rollout"):
                    self._submit_upcoming(index, weights)
                    trajectories = self.pending.popleft().trajectories()
                with clock("score"):
                    scored = self.score(trajectories)
                    self.mismatch(trajectories, scored)
                    episodes = make_episodes(trajectories, scored, ppo, kl_coefficient)
            with clock("update"):
                statistics = self.learners.update(episodes, orders, coefficients, demonstrations)
            with clock("sync"):
                weights = self.learners.policy_weights()
            self.kl.update(sum(output.kl for output in scored) / len(scored), len(scored))
            self.step += 1
            seconds = clock.seconds()
            previous_end = time.perf_counter()
            yield Step(
                index=index,
                trajectories=trajectories,
                scored=scored,
                episodes=episodes,
                coefficients=coefficients,
                kl_coefficient=kl_coefficient,
                logit_spacing=self.mismatch.logit_spacing,
                statistics=statistics,
                seconds=seconds,
            )

    def submit(self, step: int, version: int, weights: AdapterWeights) -> None:
        """Start to generate the batch of a step with these weights."""
        requests = self.prompts.requests(step)
        future = self.rollouts.submit(version, weights, requests, self.sampling)
        self.pending.append(PendingBatch(step, version, weights, future))

    def _submit_upcoming(self, index: int, weights: AdapterWeights) -> None:
        """Submit the batches of this step and of the next `max_staleness` steps, unless they are pending already."""
        first = index + len(self.pending)
        end = min(index + self.max_staleness + 1, self.ppo.steps)
        for step in range(first, end):
            self.submit(step, index, weights)


def step_coefficients(
    learner: LearnerSettings, ppo: PpoSettings, index: int, kl_coefficient: float
) -> StepCoefficients:
    """The coefficients of a step. During the critic's warmup the policy's learning rate is 0."""
    factor = schedule_factor(learner.schedule, index, ppo.steps, learner.warmup)
    policy_peak = 0.0 if index < ppo.critic.warmup else learner.policy_learning_rate
    return StepCoefficients(
        policy_lr=policy_peak * factor,
        critic_lr=learner.critic_learning_rate * factor,
        kl_in_loss=kl_coefficient if ppo.kl.where == "loss" else 0.0,
    )


class Clock:
    """Seconds by part of one step. The part `between` is the time since the end of the previous step."""

    def __init__(self, previous_end: float) -> None:
        self._start = time.perf_counter()
        self._parts = {"between": self._start - previous_end}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a part."""
        start = time.perf_counter()
        yield
        self._parts[part] = time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, and from the start of the step as `step`."""
        return self._parts | {"step": time.perf_counter() - self._start}
