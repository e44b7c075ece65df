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
from align.evaluation.policy import REFERENCE_VERSION, Evaluator
from align.learner.group import Learners, LocalLearners
from align.ppo.checkpoint import Progressed, read_asked, read_progress, read_states, write_state
from align.ppo.fault_dump import write_batch
from align.ppo.loop import Asked, Ppo, Step
from align.ppo.metrics import step_metrics, step_samples
from align.ppo.mismatch import check_parity
from align.ppo.prompts import PromptStream
from align.ppo.stop_rule import StopRule
from align.resources.ray_cluster import computing, ray_cluster
from align.roles.build import build_roles
from align.runs.checkpoint import latest, new_checkpoint
from align.runs.fingerprint import product_digests
from align.runs.folder import RunFolder, write_facts
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.failures import Fault
from align.runtime.progress import Progress
from align.runtime.seeds import permutation, seed_for
from align.runtime.signals import Interrupted
from align.scoring.build import REWARD_STATE, Judges, make_evaluator, make_judges
from align.scoring.reward import RolesScore
from align.stages.context import Job
from policies.files.adapters import save_adapter
from policies.trunk import AdapterWeights
from rollouts.async_rollouts import Ahead, AtOnce, Renewing
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.pool import LocalPool, Pool
from rollouts.transformers_engine import ROLE as SAMPLER
from rollouts.transformers_engine import make_engine


def run_ppo(job: Job) -> None:
    """Train from the last checkpoint, or the start, to the end; then `policy/` is the best policy evaluated.

    Raises Interrupted after a checkpoint if asked to stop.
    """
    settings, judges = job.experiment, make_judges(job.experiment, job.run, job.tokenizer)
    actors = settings.rollouts.workers + settings.learner.ranks
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(settings.cluster, actors))
        learners, pool = _build(job, judges, stack)
        # Without an SFT adapter the policy's own, before the first update, changes nothing: it is the base.
        reference = judges.blueprint.reference or learners.policy_weights()
        evaluator = make_evaluator(
            settings, judges, pool, learners.score, reference, job.inputs.prompts_heldout, job.tokenizer
        )
        progressed, asked = _resume(job, learners)
        if progressed.reward:
            judges.reward.composition.restore(progressed.reward)
        else:
            _calibrate(job, judges, pool, learners.score, reference)
        ppo = Ppo(
            prompts=PromptStream(job.inputs.prompts, settings.ppo.batch, settings.ppo.samples, settings.seed),
            asker=pool if isinstance(pool, Ahead) else AtOnce(pool),
            learners=learners,
            score=judges.learn_by(learners.score),
            kl=_kl_coefficient(settings.ppo.kl, progressed.kl_coefficient),
            sampling=Sampling(
                settings.rollouts.temperature, settings.rollouts.max_new_tokens, settings.rollouts.stretch
            ),
            ppo=settings.ppo,
            learner=settings.learner,
            seed=settings.seed,
            demonstrations=job.inputs.examples,
            max_age=settings.rollouts.max_age,
            step=progressed.step,
        )
        pool.load_adapter(ppo.step, learners.policy_weights())
        check_parity(pool, learners.score, ppo.prompts.requests(ppo.step), ppo.sampling)
        for batch in asked:
            ppo.ask(*batch)
        rule = None if settings.ppo.stop is None else StopRule(settings.ppo.stop, *progressed.stop)
        before, skipped = progressed.seconds, 0
        with Progress("ppo", settings.ppo.steps) as progress:
            for step in () if progressed.stopped else ppo.steps():
                metrics = _log(job, judges, step, progress)
                skipped = skipped + 1 if metrics["learner/skipped_steps"] else 0
                if skipped == settings.learner.max_skipped:
                    raise _fault(job, step, skipped)
                progressed.stopped = rule.reason(metrics) if rule else None
                last = ppo.step == settings.ppo.steps or progressed.stopped is not None
                if last or _due(ppo.step, settings.evaluation.every):
                    _evaluate(job, judges, evaluator, learners, ppo.step, progressed)
                if last or _due(ppo.step, settings.checkpoint.every) or job.stop.requested:
                    progressed.step, progressed.kl_coefficient = ppo.step, ppo.kl.value
                    progressed.reward = judges.reward.composition.state()
                    progressed.stop = [rule.best, rule.offences] if rule else []
                    progressed.seconds = before + time.perf_counter() - started
                    progressed.asked = [batch.version for batch in ppo.asked]
                    _save(job, learners, progressed, ppo.asked)
                if job.stop.requested:
                    raise Interrupted
                if last:
                    break
    _finish(job, before + time.perf_counter() - started, progressed.stopped)


def _build(job: Job, judges: Judges, stack: ExitStack) -> tuple[Learners, Pool]:
    """Learner and pool, each in this process or in actors. In one process they share the trunk.

    Not at ZeRO 3, where the trunk's weights are gathered for the learner's own passes only.
    """
    settings, blueprint = job.experiment, judges.blueprint
    rollouts, learner, ppo = settings.rollouts, settings.learner, settings.ppo
    shares = rollouts.workers == 0 and learner.ranks == 0 and learner.zero < 3
    pool: Pool
    learners: Learners
    if rollouts.workers:
        from rollouts.ray_pool import RayPool  # Ray is slow to import, and only wanted here

        build = partial(build_engine, settings.model, settings.policy, rollouts)
        each = computing(settings, rollouts.workers)
        if rollouts.engine == "vllm":
            each = replace(each, deterministic=False)  # it has kernels that torch does not know to be so
        workers = RayPool(
            build, rollouts.workers, rollouts.prompts_a_chunk, rollouts.timeout, rollouts.slow, each, rollouts.gpus
        )
        pool = workers
        if rollouts.max_age:
            pool = Renewing(workers) if rollouts.stretch else Ahead(workers)
        stack.callback(pool.close)
    elif not shares:
        pool = LocalPool(build_engine(settings.model, settings.policy, rollouts), rollouts.prompts_a_chunk)
    if learner.ranks:
        from align.learner.ray_ranks import RayLearners

        each = computing(settings, learner.ranks)
        learners = RayLearners(blueprint, ppo, learner, rollouts.temperature, each)
    else:
        roles = build_roles(blueprint, ppo.critic_if_any, (SAMPLER,) if shares else ())
        if shares:
            pool = LocalPool(make_engine(roles.trunk, job.tokenizer, rollouts), rollouts.prompts_a_chunk)
        learners = LocalLearners(roles, ppo, learner, rollouts.temperature, settings.model.gradient_checkpointing)
    stack.callback(learners.close)
    return learners, pool


def _kl_coefficient(kl: KlSettings, value: float) -> KlCoefficient:
    return FixedKl(value) if kl.target is None else AdaptiveKl(value, kl.target, kl.horizon)


def _resume(job: Job, learners: Learners) -> tuple[Progressed, list[tuple[int, int, AdapterWeights]]]:
    """Take up the last checkpoint; without one, the start. Also the batches that were being answered."""
    settings = job.experiment
    ranks, zero = settings.learner.ranks, settings.learner.zero
    last, products = latest(job.run.checkpoints("ppo")), product_digests(job.run)
    if last is None:
        return Progressed(0, settings.ppo.kl.coefficient, 0, None, {}, [], None, 0.0, ranks, zero, [], products), []
    progressed = read_progress(last, products)
    states = read_states(last, settings.policy, settings.ppo.critic_if_any, progressed.ranks)
    learners.restore(states, progressed.zero)
    progressed.ranks, progressed.zero = ranks, zero
    return progressed, read_asked(last, settings.policy, progressed)


def _calibrate(job: Job, judges: Judges, pool: Pool, roles_score: RolesScore, reference: AdapterWeights) -> None:
    """Normalise the terms that want it by what they say of the reference's responses."""
    composition, count = judges.reward.composition, job.experiment.reward.normalise
    if not composition.calibrated:
        return
    pool.load_adapter(REFERENCE_VERSION, reference)
    seed, rollouts, prompts = job.experiment.seed, job.experiment.rollouts, job.inputs.prompts
    chosen = permutation(len(prompts), seed, "normalise terms")[:count]
    requests = [replace(prompts[i], seed=seed_for(seed, "normalise terms", i)) for i in chosen]
    samples = pool.generate(requests, Sampling(rollouts.temperature, rollouts.max_new_tokens))
    raw, _ = judges.reward.raw(samples, roles_score(samples, ("reward",)))
    composition.calibrate(raw)


def _fault(job: Job, step: Step, skipped: int) -> Fault:
    """Keep the batch for people to look at."""
    folder = job.run.path / "faults" / f"step-{step.index + 1}"
    write_batch(folder, step, job.tokenizer)
    return Fault(
        f"the gradient was not finite in {skipped} steps in a row (learner.max_skipped); the episodes of the last one "
        f"are in {folder}"
    )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _log(job: Job, judges: Judges, step: Step, progress: Progress) -> dict[str, float]:
    """Write the step down; its figures."""
    gold = None if judges.gold is None else judges.gold(step.trajectories)
    metrics = step_metrics(step, job.experiment.ppo, gold)
    if job.experiment.reward.constraint:
        metrics["reward/multiplier"] = judges.reward.composition.multiplier
    job.tracker.log("ppo", step.index + 1, metrics)
    rows = step_samples(step, job.tokenizer, job.experiment.tracking.samples, gold)
    job.tracker.samples("ppo", step.index + 1, rows)
    figures = {"episodes": (step.index + 1) * len(step.episodes), "reward": metrics["reward/mean"]}
    progress.advance(step.index + 1, **figures, kl=metrics["kl/sequence"])
    return metrics


def _evaluate(
    job: Job, judges: Judges, evaluator: Evaluator, learners: Learners, step: int, progressed: Progressed
) -> None:
    """Judge the policy; if no earlier one was better, keep it in `best/`."""
    weights = learners.policy_weights()
    figures = evaluator.judge(step, weights)
    policy: dict[str, float] = figures["policy"]
    shown = ("score_mean", "gold_mean", "spread_mean", "kl_per_sequence", "win_rate", "gold_win_rate")
    job.tracker.log("ppo", step, {f"eval/{name}": policy[name] for name in shown if name in policy})
    value = policy[job.experiment.evaluation.best]
    # Scores of a reward that has learned since cannot be compared: the newest policy is the best known.
    moved = judges.reward.composition.learns and job.experiment.evaluation.best == "score_mean"
    if moved or progressed.best is None or value >= progressed.best:
        progressed.best_step, progressed.best = step, value
        with new_folder(job.run.best) as folder:
            save_adapter(folder, weights, job.experiment.policy, job.experiment.model.path)
            write_json(folder / "evaluation.json", figures)
            write_json(folder / REWARD_STATE, judges.reward.composition.state())


def _save(job: Job, learners: Learners, progressed: Progressed, asked: Collection[Asked]) -> None:
    settings = job.experiment
    states = learners.state()
    with new_checkpoint(job.run.checkpoints("ppo"), progressed.step, settings.checkpoint.keep) as folder:
        write_state(folder, states, settings.policy, settings.model.path, progressed, asked)


def _finish(job: Job, seconds: float, stopped: str | None) -> None:
    """The best policy becomes the run's. stopped: why PPO ended early."""
    write_facts(job.run.best, {"seconds": seconds} | ({"stopped": stopped} if stopped else {}))
    job.run.best.rename(job.run.policy)


def policy_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy."""
    return json.loads((run.policy / "evaluation.json").read_text())
