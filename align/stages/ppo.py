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
from align.stages.microbatch_size import keep_size, with_kept_size
from align.stages.ppo_parts import PpoParts, assemble, gpus_left_to_actors
from align.stages.ppo_record import PpoRecord, publish_best


def run_ppo(context: StageContext) -> None:
    """Train from the last checkpoint, or from the start, to the end; `policy/` becomes the best evaluated policy.

    Ray must be running where the settings use it.

    Raises:
        Interrupted: A stop was requested; the state of the last completed step is in a checkpoint.
        Fault: Sampler and learner disagree, or gradients are not finite in too many consecutive steps.
    """
    context = with_kept_size(context, "ppo")
    experiment = context.experiment
    with ExitStack() as stack:
        stack.enter_context(gpus_left_to_actors(context))
        scorers = build_scorers(experiment, context.run, context.tokenizer)
        stack.callback(scorers.close)
        started = time.perf_counter()
        try:
            with context.stop.droppable():  # nothing that it builds would be saved
                parts = assemble(context, scorers, stack)
            keep_size(context.run, "ppo", parts.loop.learners.tokens_per_microbatch())
            progress_bar = stack.enter_context(ProgressBar("ppo", experiment.ppo.steps))
            record = PpoRecord(context, parts, progress_bar, started)
            _run_steps(context, parts, record)
        except KeyboardInterrupt:
            if context.stop.dropped:
                raise Interrupted from None
            raise
    publish_best(context, record.seconds(), parts.progress.stopped)


def _run_steps(context: StageContext, parts: PpoParts, record: PpoRecord) -> None:
    """Run the remaining steps, and save the state of the last one's end where the next is dropped."""
    every = context.experiment.evaluation.every
    try:
        for step in parts.remaining_steps():
            metrics = record.log(step)
            record.check_skipped(step, metrics)
            is_last = parts.is_last_step(metrics)
            if is_last or _is_due(parts.loop.step, every):
                record.evaluate()
            record.note_state()
            if is_last or record.is_checkpoint_due() or context.stop.requested:
                record.save()
            if context.stop.requested:
                raise Interrupted
            if is_last:
                break
    except KeyboardInterrupt:
        if context.stop.dropped:
            record.save()
        raise


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def policy_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy."""
    figures: dict[str, Any] = json.loads((run.policy / "evaluation.json").read_text())
    return figures
