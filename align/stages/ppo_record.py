"""Records a PPO run: metrics, samples, evaluations, checkpoints, and the best policy."""

import time

from align.config.schema import Experiment
from align.diagnosis.diagnose import diagnose
from align.ppo.checkpoint import write_checkpoint
from align.ppo.fault_dump import write_fault_dump
from align.ppo.loop import Step
from align.ppo.metrics import step_histograms, step_metrics, step_samples
from align.resources.actors import RANK, WORKER
from align.runs.checkpoint import CheckpointTimer, new_checkpoint
from align.runs.record_files import EVENTS, read_lines
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.failures import Fault
from align.runtime.progress import ProgressBar
from align.scoring.build import REWARD_STATE
from align.stages.context import StageContext
from align.stages.ppo_parts import PpoParts
from policies.files.adapters import save_adapter


class PpoRecord:
    """Records the steps of a run in its folder and its trackers."""

    def __init__(self, context: StageContext, parts: PpoParts, progress_bar: ProgressBar, started: float) -> None:
        """Prepare to record.

        Args:
            context: The context of the stage.
            parts: The parts of PPO; their progress is kept up to date.
            progress_bar: The stage's progress bar.
            started: The value of `time.perf_counter()` when the stage started.
        """
        self.context = context
        self.parts = parts
        self.progress = parts.progress
        self.progress_bar = progress_bar
        self._started = started
        self._seconds_before = parts.progress.seconds
        self._skipped_in_a_row = 0
        self._saved_step = parts.progress.step
        checkpoint = context.experiment.checkpoint
        self._timer = CheckpointTimer(checkpoint.every, checkpoint.minutes)
        self.note_state()

    def seconds(self) -> float:
        """Seconds spent on PPO so far, including those before the last resumption."""
        return self._seconds_before + time.perf_counter() - self._started

    def log(self, step: Step) -> dict[str, float]:
        """Write the metrics and samples of a step, and return the metrics."""
        experiment = self.context.experiment
        scorers = self.parts.scorers
        number = step.index + 1
        gold = None if scorers.gold is None else scorers.gold(step.trajectories)
        metrics = step_metrics(step, experiment.ppo, gold)
        if experiment.reward.constraint:
            metrics["reward/multiplier"] = scorers.reward.composition.multiplier
        metrics |= self._peak_memory()
        self.context.tracker.log("ppo", number, {**metrics, **step_histograms(step)})
        samples = step_samples(step, self.context.tokenizer, experiment.tracking.samples, gold)
        self.context.tracker.samples("ppo", number, samples, show=shows_samples(experiment, number))
        self.progress_bar.advance(
            number,
            tokens=sum(trajectory.total_length for trajectory in step.trajectories),
            episodes=number * len(step.episodes),
            reward=metrics["reward/mean"],
            **({} if gold is None else {"gold": metrics["reward/gold_mean"]}),
            kl=metrics["kl/per_sequence"],
            length=metrics["rollout/length_mean"],
        )
        return metrics

    def _peak_memory(self) -> dict[str, float]:
        """The peak memory so far of each kind of process, as metrics."""
        peaks = self.context.peaks
        peaks.note(RANK, self.parts.loop.learners.ranks.peak_memory())
        peaks.note(WORKER, self.parts.pool.peak_memory)
        return {f"perf/peak_memory/{kind.replace(' ', '_')}": peak for kind, peak in peaks.by_kind().items()}

    def check_skipped(self, step: Step, metrics: dict[str, float]) -> None:
        """Count consecutive steps with a non-finite gradient.

        Raises:
            Fault: They reach `learner.max_skipped`; the episodes of the step have been written to a folder.
        """
        limit = self.context.experiment.learner.max_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics["learner/skipped_steps"] else 0
        if self._skipped_in_a_row == limit:
            folder = self.context.run.path / "faults" / f"step-{step.index + 1}"
            write_fault_dump(folder, step, self.context.tokenizer)
            raise Fault(
                f"the gradient was not finite in {limit} consecutive steps (learner.max_skipped); the episodes of the "
                f"last one are in {folder}"
            )

    def evaluate(self) -> None:
        """Evaluate the policy; keep it in `best/` unless an earlier one was better."""
        context = self.context
        loop = self.parts.loop
        experiment = context.experiment
        composition = self.parts.scorers.reward.composition
        weights = loop.learners.policy_weights()
        evaluation = self.parts.evaluator.evaluate(loop.step, weights)
        policy: dict[str, float] = evaluation.sections["policy"]
        logged = {f"eval/{name}": value for name, value in policy.items() if name != "step"}
        context.tracker.log("ppo", loop.step, logged)
        probes = evaluation.probes(context.tokenizer, experiment.tracking.probes)
        context.tracker.probes("ppo", loop.step, probes, show=experiment.tracking.texts)
        value = policy[experiment.evaluation.best]
        # Scores before and after a change of the reward cannot be compared: then the newest policy counts as the best.
        reward_changes = composition.is_stateful and experiment.evaluation.best == "score_mean"
        if reward_changes or self.progress.best is None or value >= self.progress.best:
            self.progress.best_step = loop.step
            self.progress.best = value
            with new_folder(context.run.best) as folder:
                save_adapter(folder, weights, experiment.policy, experiment.model.path)
                write_json(folder / "evaluation.json", evaluation.sections)
                write_json(folder / REWARD_STATE, composition.state())
        self._note_verdicts()

    def _note_verdicts(self) -> None:
        """Note what the diagnosis has not said before as events, of which W&B alerts."""
        run = self.context.run.path
        known = {event["event"] for event in read_lines(run / EVENTS)}
        for verdict in diagnose(run):
            if verdict.name not in known:
                self.context.tracker.event("ppo", verdict.name, verdict.text)

    def note_state(self) -> None:
        """Note, between two steps, what rollouts and scoring change before the update begins."""
        loop = self.parts.loop
        progress = self.progress
        progress.step = loop.step
        progress.kl_coefficient = loop.kl.value
        progress.reward = self.parts.scorers.reward.composition.state()
        progress.stop = self.parts.stop_rule.state()
        progress.pending = [batch.version for batch in loop.pending]
        self._pending = list(loop.pending)

    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by the number of steps or by the time since the last."""
        return self._timer.is_due(self.parts.loop.step)

    def save(self) -> None:
        """Write a checkpoint of the state that was noted last, unless it has been written.

        The learner must not have been updated since.
        """
        progress = self.progress
        if self._saved_step == progress.step:
            return
        experiment = self.context.experiment
        progress.seconds = self.seconds()
        states = self.parts.loop.learners.state()
        checkpoints = self.context.run.checkpoints("ppo")
        with new_checkpoint(checkpoints, progress.step, experiment.checkpoint.keep) as folder:
            write_checkpoint(
                folder=folder,
                states=states,
                policy=experiment.policy,
                base=experiment.model.path,
                progress=progress,
                pending=self._pending,
            )
        self._saved_step = progress.step
        self._timer.restart()


def shows_samples(experiment: Experiment, number: int) -> bool:
    """Whether W&B shows the samples of a step, counted from 1."""
    if not experiment.tracking.texts:
        return False
    every = experiment.evaluation.every
    is_evaluated = number == experiment.ppo.steps or (every > 0 and number % every == 0)
    return is_evaluated or number % experiment.tracking.samples_every == 0


def publish_best(context: StageContext, seconds: float, stopped: str | None) -> None:
    """Make the best evaluated policy the run's policy.

    Args:
        context: The context of the stage.
        seconds: Seconds spent on PPO.
        stopped: Why the stop rule stopped PPO; None where it did not.
    """
    facts: dict[str, float | str] = {"seconds": seconds}
    if stopped:
        facts["stopped"] = stopped
        context.tracker.event("ppo", "stopped early", stopped)
    context.write_facts(context.run.best, facts)
    context.run.best.rename(context.run.policy)
