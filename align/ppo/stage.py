"""Stage three: builds the parts of PPO as the settings say, and runs them with evaluation, checkpoints and metrics."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from align.checkpoint import latest, new_checkpoint
from align.cluster import ray_cluster, threads
from align.evaluate import Evaluator
from align.files import new_folder, write_json
from align.interrupt import Interrupted, Stop
from align.ppo.build import Blueprint, build_roles
from align.ppo.checkpoint import Progressed, read_progress, read_states, write_state
from align.ppo.group import Learners, LocalLearners, RayLearners
from align.ppo.kl import AdaptiveKl, FixedKl, KlCoefficient
from align.ppo.loop import Ppo, Step
from align.ppo.metrics import step_metrics, step_samples
from align.ppo.prompts import PromptStream
from align.progress import Progress
from align.run import RunFolder
from align.schema import Experiment, KlSettings
from align.scoring import Gold, Reward
from align.tracking import Tracker
from policies.adapters import lora_config, save_adapter
from policies.loading import stop_ids
from policies.trunk import AdapterWeights
from rollouts.engine import Sampling
from rollouts.hf import ROLE as SAMPLER
from rollouts.hf import TransformersEngine, build_engine
from rollouts.pool import LocalPool, Pool, RayPool
from rollouts.trajectory import Request, Scored, Trajectory


@dataclass(frozen=True)
class PpoInputs:
    """What the stage is given: data, the products of the earlier stages, and where to write."""

    experiment: Experiment
    run: RunFolder
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Request]
    heldout: Sequence[Request]
    blueprint: Blueprint
    reward: Reward
    gold: Gold | None
    tracker: Tracker
    stop: Stop


def run_ppo(inputs: PpoInputs) -> float:
    """Train from the last checkpoint, or the start, to the end; then `policy/` is the best policy evaluated.

    Returns seconds, those before a resume included. Raises Interrupted after a checkpoint if asked to stop.
    """
    settings = inputs.experiment
    actors = settings.rollouts.workers + settings.learner.ranks
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(ray_cluster(settings.cluster, actors))
        learners, pool = _build(inputs, stack)
        reference = _reference_weights(inputs, learners)
        sampling = Sampling(settings.rollouts.temperature, settings.rollouts.max_new_tokens)

        def score(trajectories: Sequence[Trajectory]) -> list[Scored]:
            return inputs.reward(trajectories, learners.score(trajectories))

        evaluation = settings.evaluation
        evaluator = Evaluator(
            pool, score, inputs.gold, reference, inputs.heldout, sampling, evaluation.seed, evaluation.best_of
        )
        progressed = _resume(inputs, learners)
        ppo = Ppo(
            prompts=PromptStream(inputs.prompts, settings.ppo.batch, settings.seed),
            pool=pool,
            learners=learners,
            score=score,
            kl=_kl_coefficient(settings.ppo.kl, progressed.kl_coefficient),
            sampling=sampling,
            ppo=settings.ppo,
            learner=settings.learner,
            seed=settings.seed,
            step=progressed.step,
        )
        before = progressed.seconds
        with Progress("ppo", settings.ppo.steps) as progress:
            for step in ppo.steps():
                _log(inputs, step, progress)
                if _due(ppo.step, evaluation.every, settings.ppo.steps):
                    _evaluate(inputs, evaluator, learners, ppo.step, progressed)
                if _due(ppo.step, settings.checkpoint.every, settings.ppo.steps) or inputs.stop.requested:
                    progressed.step, progressed.kl_coefficient = ppo.step, ppo.kl.value
                    progressed.seconds = before + time.perf_counter() - started
                    _save(inputs, learners, progressed)
                if inputs.stop.requested:
                    raise Interrupted
        _finish(inputs)
    return progressed.seconds


def _build(inputs: PpoInputs, stack: ExitStack) -> tuple[Learners, Pool]:
    """Learner and pool, each in this process or in actors. In one process they share the trunk.

    Not at ZeRO 3, where the trunk's weights are gathered for the learner's own passes only.
    """
    settings, blueprint = inputs.experiment, inputs.blueprint
    rollouts, learner, ppo = settings.rollouts, settings.learner, settings.ppo
    shares = rollouts.workers == 0 and learner.ranks == 0 and learner.zero < 3
    torch.set_num_threads(threads(settings.cluster, 1))
    pool: Pool
    learners: Learners
    if rollouts.workers:
        build = partial(build_engine, settings.model, settings.policy, rollouts.rows)
        each = threads(settings.cluster, rollouts.workers)
        pool = RayPool(build, rollouts.workers, rollouts.rows, rollouts.timeout, each, rollouts.gpus)
        stack.callback(pool.close)
    elif not shares:
        pool = LocalPool(build_engine(settings.model, settings.policy, rollouts.rows))
    if learner.ranks:
        each = threads(settings.cluster, learner.ranks)
        learners = RayLearners(blueprint, ppo, learner, rollouts.temperature, each)
    else:
        roles = build_roles(blueprint, (SAMPLER,) if shares else ())
        if shares:
            stops = stop_ids(roles.trunk.causal, inputs.tokenizer)
            pool = LocalPool(TransformersEngine(roles.trunk, stops, rollouts.rows))
        learners = LocalLearners(roles, ppo, learner, rollouts.temperature, settings.model.gradient_checkpointing)
    stack.callback(learners.close)
    return learners, pool


def _reference_weights(inputs: PpoInputs, learners: Learners) -> AdapterWeights:
    """The SFT adapter; without one, an adapter that changes nothing: the policy's own before the first update."""
    return inputs.blueprint.reference or learners.policy_weights()


def _kl_coefficient(kl: KlSettings, value: float) -> KlCoefficient:
    return FixedKl(value) if kl.target is None else AdaptiveKl(value, kl.target, kl.horizon)


def _resume(inputs: PpoInputs, learners: Learners) -> Progressed:
    """Take up the last checkpoint; without one, the start."""
    settings = inputs.experiment
    ranks, zero = settings.learner.ranks, settings.learner.zero
    last = latest(inputs.run.checkpoints("ppo"))
    if last is None:
        return Progressed(0, settings.ppo.kl.coefficient, 0, None, 0.0, ranks, zero)
    progressed = read_progress(last, ranks, zero)
    learners.restore(read_states(last, settings.policy, ranks))
    return progressed


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)


def _log(inputs: PpoInputs, step: Step, progress: Progress) -> None:
    gold = None if inputs.gold is None else inputs.gold(step.trajectories)
    metrics = step_metrics(step, gold)
    inputs.tracker.log("ppo", step.index + 1, metrics)
    rows = step_samples(step, inputs.tokenizer, inputs.experiment.tracking.samples, gold)
    inputs.tracker.samples("ppo", step.index + 1, rows)
    figures = {"episodes": (step.index + 1) * len(step.episodes), "reward": metrics["reward/mean"]}
    progress.advance(step.index + 1, **figures, kl=metrics["kl/sequence"])


def _evaluate(
    inputs: PpoInputs, evaluator: Evaluator, learners: Learners, step: int, progressed: Progressed
) -> None:
    """Judge the policy; if no earlier one was better, keep it in `best/`."""
    weights = learners.policy_weights()
    figures = evaluator.judge(step, weights)
    policy: dict[str, float] = figures["policy"]
    shown = ("score_mean", "gold_mean", "kl_per_sequence", "win_rate", "gold_win_rate")
    inputs.tracker.log("ppo", step, {f"eval/{name}": policy[name] for name in shown if name in policy})
    value = policy[inputs.experiment.evaluation.best]
    if progressed.best is None or value >= progressed.best:
        progressed.best_step, progressed.best = step, value
        _write_policy(inputs, weights, figures)


def _write_policy(inputs: PpoInputs, weights: AdapterWeights, figures: dict[str, Any]) -> None:
    with new_folder(inputs.run.best) as folder:
        save_adapter(folder, weights, lora_config(inputs.experiment.policy, inputs.experiment.model.path))
        write_json(folder / "evaluation.json", figures)


def _save(inputs: PpoInputs, learners: Learners, progressed: Progressed) -> None:
    settings = inputs.experiment
    states = learners.state()
    with new_checkpoint(inputs.run.checkpoints("ppo"), progressed.step, settings.checkpoint.keep) as folder:
        write_state(folder, states, lora_config(settings.policy, settings.model.path), progressed)


def _finish(inputs: PpoInputs) -> None:
    """The best policy becomes the run's."""
    inputs.run.best.rename(inputs.run.policy)


def policy_figures(run: RunFolder) -> dict[str, Any]:
    """The evaluation that was written with the run's policy."""
    return json.loads((run.policy / "evaluation.json").read_text())
