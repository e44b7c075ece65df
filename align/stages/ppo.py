"""The PPO stage: assembles the parts, runs the loop, and records its steps."""

import json
import time
from contextlib import ExitStack
from typing import Any

from align.runs.folder import RunFolder
from align.runtime.progress import ProgressBar
from align.runtime.signals import Interrupted
from align.scoring.build import build_scorers
from align.stages.context import StageContext
from align.stages.ppo_parts import assemble
from align.stages.ppo_record import PpoRecord, publish_best


def run_ppo(context: StageContext) -> None:
    """Train from the last checkpoint, or from the start, to the end; `policy/` becomes the best evaluated policy.

    Ray must be running where the settings use it.

    Raises:
        Interrupted: A stop was requested; a checkpoint has been written.
        Fault: Sampler and learner disagree, or gradients are not finite in too many consecutive steps.
    """
    experiment = context.experiment
    scorers = build_scorers(experiment, context.run, context.tokenizer)
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.callback(scorers.close)
        parts = assemble(context, scorers, stack)
        progress_bar = stack.enter_context(ProgressBar("ppo", experiment.ppo.steps))
        record = PpoRecord(context, parts, progress_bar, started)
        for step in parts.remaining_steps():
            metrics = record.log(step)
            record.check_skipped(step, metrics)
            is_last = parts.is_last_step(metrics)
            if is_last or _is_due(parts.loop.step, experiment.evaluation.every):
                record.evaluate()
            if is_last or _is_due(parts.loop.step, experiment.checkpoint.every) or context.stop.requested:
                record.save()
            if context.stop.requested:
                raise Interrupted
            if is_last:
                break
    publish_best(context, record.seconds(), parts.progress.stopped)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def policy_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy."""
    figures: dict[str, Any] = json.loads((run.policy / "evaluation.json").read_text())
    return figures
