"""Stage three: builds the parts of PPO as the settings say, and runs them with evaluation, checkpoints and metrics."""

import json
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from align.algorithms.kl import AdaptiveKl, FixedKl, KlCoefficient
from align.config.schema import KlSettings
from align.evaluation.policy import REFERENCE_VERSION, Evaluator, build_evaluator
from align.learner.group import Learners, LocalLearners
from align.ppo.checkpoint import PpoProgress, read_pending, read_progress, read_states, write_state
from align.ppo.fault_dump import write_fault_dump
from align.ppo.loop import PendingBatch, Ppo, Step
from align.ppo.metrics import step_metrics, step_samples
from align.ppo.mismatch import check_parity
from align.ppo.prompts import PromptStream
from align.ppo.stop_rule import StopRule
from align.resources.ray_cluster import compute_settings, ray_cluster
from align.roles.build import build_roles
from align.runs.checkpoint import latest, new_checkpoint
from align.runs.fingerprint import product_digests
from align.runs.folder import RunFolder, write_facts
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.failures import Fault
from align.runtime.progress import ProgressBar
from align.runtime.seeds import permutation, seed_for
from align.runtime.signals import Interrupted
from align.scoring.build import REWARD_STATE, Scorers, build_scorers
from align.scoring.reward import RoleScorer
from align.stages.context import StageContext
from policies.files.adapters import save_adapter
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import AsyncRollouts, PartialRollouts, SynchronousRollouts
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.pool import LocalPool, Pool
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine


def run_ppo(context: StageContext) -> None:
    """Train from the last checkpoint, or the start, to the end; then `policy/` is the best policy evaluated.

    Raises Interrupted after a checkpoint if asked to stop.
    """
    settings, scorers = context.experiment, build_scorers(context.experiment, context.run, context.tokenizer)
    actors = settings.rollouts.workers + settings.learner.ranks
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(settings.cluster, actors))
        learners, pool = _build(context, scorers, stack)
        # Without an SFT adapter the policy's own, before the first update, changes nothing: it is the base.
        reference = scorers.blueprint.reference or learners.policy_weights()
        evaluator = build_evaluator(
            settings, scorers, pool, learners.score, reference, context.datasets.prompts_heldout, context.tokenizer
        )
        progressed, pending = _resume(context, learners)
        if progressed.reward:
            scorers.reward.composition.restore(progressed.reward)
        else:
            _calibrate(context, scorers, pool, learners.score, reference)
        ppo = Ppo(
            prompts=PromptStream(
                context.datasets.prompts, settings.ppo.batch_size, settings.ppo.samples_per_prompt, settings.seed
            ),
            rollouts=pool if isinstance(pool, AsyncRollouts) else SynchronousRollouts(pool),
            learners=learners,
            score=scorers.training_scorer(learners.score),
            kl=_kl_coefficient(settings.ppo.kl, progressed.kl_coefficient),
            sampling=Sampling(
                settings.rollouts.temperature, settings.rollouts.max_new_tokens, settings.rollouts.segment_tokens
            ),
            ppo=settings.ppo,
            learner=settings.learner,
            seed=settings.seed,
            demonstrations=context.datasets.demonstrations,
            max_staleness=settings.rollouts.max_staleness,
            step=progressed.step,
        )
        pool.load_adapter(ppo.step, learners.policy_weights())
        check_parity(pool, learners.score, ppo.prompts.requests(ppo.step), ppo.sampling)
        for batch in pending:
            ppo.submit(*batch)
        rule = None if settings.ppo.stop is None else StopRule(settings.ppo.stop, *progressed.stop)
        before, skipped = progressed.seconds, 0
        with ProgressBar("ppo", settings.ppo.steps) as progress:
            for step in () if progressed.stopped else ppo.steps():
                metrics = _log(context, scorers, step, progress)
                skipped = skipped + 1 if metrics["learner/skipped_steps"] else 0
                if skipped == settings.learner.max_skipped:
                    raise _fault(context, step, skipped)
                progressed.stopped = rule.reason(metrics) if rule else None
                last = ppo.step == settings.ppo.steps or progressed.stopped is not None
                if last or _due(ppo.step, settings.evaluation.every):
                    _evaluate(context, scorers, evaluator, learners, ppo.step, progressed)
                if last or _due(ppo.step, settings.checkpoint.every) or context.stop.requested:
                    progressed.step, progressed.kl_coefficient = ppo.step, ppo.kl.value
                    progressed.reward = scorers.reward.composition.state()
                    progressed.stop = [rule.best, rule.offences] if rule else []
                    progressed.seconds = before + time.perf_counter() - started
                    progressed.pending = [batch.version for batch in ppo.pending]
                    _save(context, learners, progressed, ppo.pending)
                if context.stop.requested:
                    raise Interrupted
                if last:
                    break
    _finish(context, before + time.perf_counter() - started, progressed.stopped)


def _build(context: StageContext, scorers: Scorers, stack: ExitStack) -> tuple[Learners, Pool]:
    """Learner and pool, each in this process or in actors. In one process they share the trunk.

    Not at ZeRO 3, where the trunk's weights are gathered for the learner's own passes only.
    """
    settings, blueprint = context.experiment, scorers.blueprint
    rollouts, learner, ppo = settings.rollouts, settings.learner, settings.ppo
    shares = rollouts.workers == 0 and learner.ranks == 0 and learner.zero < 3
    pool: Pool
    learners: Learners
    if rollouts.workers:
        from rollouts.ray_pool import PoolSettings, RayPool  # Ray is slow to import, and only wanted here

        build = partial(build_engine, settings.model, settings.policy, rollouts)
        each = compute_settings(settings, rollouts.workers)
        if rollouts.engine == "vllm":
            each = replace(each, deterministic=False)  # it has kernels that torch does not know to be so
        pool_settings = PoolSettings(
            workers=rollouts.workers,
            chunk_size=rollouts.effective_chunk_size,
            timeout=rollouts.timeout,
            straggler_factor=rollouts.straggler_factor,
            gpus=rollouts.gpus,
        )
        workers = RayPool(build, pool_settings, each)
        pool = workers
        if rollouts.max_staleness:
            pool = PartialRollouts(workers) if rollouts.segment_tokens else AsyncRollouts(workers)
        stack.callback(pool.close)
    elif not shares:
        pool = LocalPool(build_engine(settings.model, settings.policy, rollouts), rollouts.effective_chunk_size)
    if learner.ranks:
        from align.learner.ray_ranks import RayLearners

        each = compute_settings(settings, learner.ranks)
        learners = RayLearners(blueprint, ppo, learner, rollouts.temperature, each)
    else:
        roles = build_roles(blueprint, ppo.active_critic, (SAMPLER_ROLE,) if shares else ())
        if shares:
            pool = LocalPool(
                make_transformers_engine(roles.trunk, context.tokenizer, rollouts), rollouts.effective_chunk_size
            )
        learners = LocalLearners(roles, ppo, learner, rollouts.temperature, settings.model.gradient_checkpointing)
    stack.callback(learners.close)
    return learners, pool


def _kl_coefficient(kl: KlSettings, value: float) -> KlCoefficient:
    return FixedKl(value) if kl.target is None else AdaptiveKl(value, kl.target, kl.horizon)


def _resume(context: StageContext, learners: Learners) -> tuple[PpoProgress, list[tuple[int, int, AdapterWeights]]]:
    """Take up the last checkpoint; without one, the start. Also the batches that were being answered."""
    settings = context.experiment
    ranks, zero = settings.learner.ranks, settings.learner.zero
    last, products = latest(context.run.checkpoints("ppo")), product_digests(context.run)
    if last is None:
        return PpoProgress(0, settings.ppo.kl.coefficient, 0, None, {}, [], None, 0.0, ranks, zero, [], products), []
    progressed = read_progress(last, products)
    states = read_states(last, settings.policy, settings.ppo.active_critic, progressed.ranks)
    learners.restore(states, progressed.zero)
    progressed.ranks, progressed.zero = ranks, zero
    return progressed, read_pending(last, settings.policy, progressed)


def _calibrate(
    context: StageContext, scorers: Scorers, pool: Pool, roles_score: RoleScorer, reference: AdapterWeights
) -> None:
    """Normalise the terms that want it by what they say of the reference's responses."""
    composition, count = scorers.reward.composition, context.experiment.reward.normalise
    if not composition.calibrated:
        return
    pool.load_adapter(REFERENCE_VERSION, reference)
    seed, rollouts, prompts = context.experiment.seed, context.experiment.rollouts, context.datasets.prompts
    chosen = permutation(len(prompts), seed, "normalise terms")[:count]
    requests = [replace(prompts[i], seed=seed_for(seed, "normalise terms", i)) for i in chosen]
    samples = pool.generate(requests, Sampling(rollouts.temperature, rollouts.max_new_tokens))
    raw, _ = scorers.reward.raw_scores(samples, roles_score(samples, ("reward",)))
    composition.calibrate(raw)


def _fault(context: StageContext, step: Step, skipped: int) -> Fault:
    """Keep the batch for people to look at."""
    folder = context.run.path / "faults" / f"step-{step.index + 1}"
    write_fault_dump(folder, step, context.tokenizer)
    return Fault(
        f"the gradient was not finite in {skipped} steps in a row (learner.max_skipped); the episodes of the last one "
        f"are in {folder}"
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _log(context: StageContext, scorers: Scorers, step: Step, progress: ProgressBar) -> dict[str, float]:
    """Write the step down; its figures."""
    gold = None if scorers.gold is None else scorers.gold(step.trajectories)
    metrics = step_metrics(step, context.experiment.ppo, gold)
    if context.experiment.reward.constraint:
        metrics["reward/multiplier"] = scorers.reward.composition.multiplier
    context.tracker.log("ppo", step.index + 1, metrics)
    rows = step_samples(step, context.tokenizer, context.experiment.tracking.samples, gold)
    context.tracker.samples("ppo", step.index + 1, rows)
    figures = {"episodes": (step.index + 1) * len(step.episodes), "reward": metrics["reward/mean"]}
    progress.advance(step.index + 1, **figures, kl=metrics["kl/per_sequence"])
    return metrics


def _evaluate(
    context: StageContext,
    scorers: Scorers,
    evaluator: Evaluator,
    learners: Learners,
    step: int,
    progressed: PpoProgress,
) -> None:
    """Judge the policy; if no earlier one was better, keep it in `best/`."""
    weights = learners.policy_weights()
    figures = evaluator.evaluate(step, weights)
    policy: dict[str, float] = figures["policy"]
    shown = ("score_mean", "gold_mean", "spread_mean", "kl_per_sequence", "win_rate", "gold_win_rate")
    context.tracker.log("ppo", step, {f"eval/{name}": policy[name] for name in shown if name in policy})
    value = policy[context.experiment.evaluation.best]
    # Scores of a reward that has learned since cannot be compared: the newest policy is the best known.
    moved = scorers.reward.composition.is_stateful and context.experiment.evaluation.best == "score_mean"
    if moved or progressed.best is None or value >= progressed.best:
        progressed.best_step, progressed.best = step, value
        with new_folder(context.run.best) as folder:
            save_adapter(folder, weights, context.experiment.policy, context.experiment.model.path)
            write_json(folder / "evaluation.json", figures)
            write_json(folder / REWARD_STATE, scorers.reward.composition.state())


def _save(
    context: StageContext, learners: Learners, progressed: PpoProgress, pending: Collection[PendingBatch]
) -> None:
    settings = context.experiment
    states = learners.state()
    with new_checkpoint(context.run.checkpoints("ppo"), progressed.step, settings.checkpoint.keep) as folder:
        write_state(folder, states, settings.policy, settings.model.path, progressed, pending)


def _finish(context: StageContext, seconds: float, stopped: str | None) -> None:
    """The best policy becomes the run's. stopped: why PPO ended early."""
    write_facts(context.run.best, {"seconds": seconds} | ({"stopped": stopped} if stopped else {}))
    context.run.best.rename(context.run.policy)


def policy_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy."""
    return json.loads((run.policy / "evaluation.json").read_text())
