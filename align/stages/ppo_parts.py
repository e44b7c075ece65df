"""The parts of PPO, chosen by the settings before the loop starts."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from align.algorithms.kl import AdaptiveKl, FixedKl, KlCoefficient
from align.config.ppo_settings import KlSettings
from align.config.schema import Experiment
from align.evaluation.policy import Evaluator, build_evaluator
from align.learner.files import read_states
from align.ppo.checkpoint import PpoProgress, SavedBatch, read_pending, read_progress, trained_roles
from align.ppo.environment import in_environment
from align.ppo.learners import PpoLearners, local_learners, ray_learners
from align.ppo.loop import Ppo, Step
from align.ppo.mismatch import MismatchCheck, check_parity
from align.ppo.prompts import PromptStream
from align.ppo.stop_rule import NoStopRule, StopCondition, StopRule
from align.resources.actors import RANK, WORKER, actors_by_stage
from align.roles.build import Blueprint, build_roles
from align.runs.checkpoint import latest
from align.runs.fingerprint import product_digests
from align.runtime.head_watch import build_watched
from align.scoring.build import Scorers
from align.stages.context import StageContext
from align.stages.policy_evaluation import calibrate
from policies.device import leave_gpu
from rollouts.async_rollouts import AsyncRollouts, PartialRollouts, SynchronousRollouts
from rollouts.build import build_engine
from rollouts.engine import Sampling
from rollouts.pool import LocalPool, Pool
from rollouts.schema import RolloutSettings
from rollouts.transformers_engine import SAMPLER_ROLE, make_transformers_engine

VLLM_UTILIZATION = 0.9
"""The part of a GPU's memory that vLLM uses by default."""


@dataclass(frozen=True)
class PpoParts:
    """The parts that the PPO stage runs and records.

    Attributes:
        loop: The controller, before its next step.
        pool: The engines.
        scorers: The scorers of the reward and the gold score.
        evaluator: Compares the policy with the reference.
        stop_rule: Decides after each step whether PPO stops early.
        progress: The progress of PPO; updated as it runs.
    """

    loop: Ppo
    pool: Pool
    scorers: Scorers
    evaluator: Evaluator
    stop_rule: StopCondition
    progress: PpoProgress

    def remaining_steps(self) -> Iterator[Step]:
        """Run the remaining steps, one at a time; none if the stop rule has already stopped PPO."""
        return iter(()) if self.progress.stopped else self.loop.steps()

    def is_last_step(self, metrics: Mapping[str, float]) -> bool:
        """Apply the stop rule to the metrics of a step. Returns whether PPO ends after it."""
        self.progress.stopped = self.stop_rule.reason(metrics)
        return self.loop.step == self.loop.ppo.steps or self.progress.stopped is not None


def gpus_left_to_actors(context: StageContext) -> AbstractContextManager[None]:
    """Have this process compute on the CPU within the block where PPO's actors compute on GPUs."""
    actors = actors_by_stage(context.experiment)["ppo"]
    if context.reservation is not None and context.reservation.uses_gpus(actors):
        return leave_gpu()
    return nullcontext()


def assemble(context: StageContext, scorers: Scorers, stack: ExitStack) -> PpoParts:
    """Build the parts, and restore the last checkpoint if there is one.

    Args:
        context: The context of the stage.
        scorers: The scorers of the reward and the gold score.
        stack: Closes the pool and the learners. Ray must be running where the settings use it.

    Raises:
        UserError: The checkpoint does not belong to the run.
        SamplerMismatch: The pool does not sample from the learner's policy.
    """
    experiment = context.experiment
    learners, sampler = _build_learners_and_pool(context, scorers.blueprint, stack)
    pool = in_environment(sampler, experiment.rollouts.environment, context.tokenizer)
    stack.callback(pool.close)
    # Without an SFT adapter the base model is the reference: the policy's adapter changes nothing before any update.
    reference = scorers.blueprint.reference or learners.policy_weights()
    evaluator = build_evaluator(
        experiment=experiment,
        scorers=scorers,
        pool=pool,
        role_scorer=learners.score,
        reference=reference,
        prompts=context.datasets.prompts_heldout,
        tokenizer=context.tokenizer,
    )
    progress, saved_batches = _resume(context, learners)
    if progress.reward:
        scorers.reward.composition.restore(progress.reward)
    else:
        calibrate(
            experiment=experiment,
            scorers=scorers,
            pool=pool,
            role_scorer=learners.score,
            reference=reference,
            prompts=context.datasets.prompts,
        )
    pool.load_adapter(progress.step, learners.policy_weights())
    requests = _prompt_stream(context).requests(progress.step)
    spacing = check_parity(sampler, learners.score, requests, _sampling(experiment))
    # Measured once, so that a resumed run has the figures of an uninterrupted one.
    progress.logit_spacing = progress.logit_spacing or spacing
    mismatch = MismatchCheck(
        logit_spacing=progress.logit_spacing,
        limit=experiment.ppo.max_mismatch,
        same_weights=experiment.rollouts.max_staleness == 0,
    )
    loop = _build_loop(context, scorers, learners, pool, progress, mismatch)
    for batch in saved_batches:
        loop.submit(batch.step, batch.version, batch.weights)
    stop_rule: StopCondition = NoStopRule()
    if experiment.ppo.stop is not None:
        stop_rule = StopRule(experiment.ppo.stop, *progress.stop)
    return PpoParts(loop=loop, pool=pool, scorers=scorers, evaluator=evaluator, stop_rule=stop_rule, progress=progress)


def _prompt_stream(context: StageContext) -> PromptStream:
    ppo = context.experiment.ppo
    return PromptStream(context.datasets.prompts, ppo.batch_size, ppo.samples_per_prompt, context.experiment.seed)


def _sampling(experiment: Experiment) -> Sampling:
    rollouts = experiment.rollouts
    return Sampling(rollouts.temperature, rollouts.max_new_tokens, rollouts.segment_tokens)


def _build_loop(
    context: StageContext,
    scorers: Scorers,
    learners: PpoLearners,
    pool: Pool,
    progress: PpoProgress,
    mismatch: MismatchCheck,
) -> Ppo:
    experiment = context.experiment
    ppo = experiment.ppo
    return Ppo(
        prompts=_prompt_stream(context),
        rollouts=pool if isinstance(pool, AsyncRollouts) else SynchronousRollouts(pool),
        learners=learners,
        # A forward pass that is interrupted could leave weights gathered, and ranks in a collective operation.
        score=scorers.training_scorer(context.stop.undroppable(learners.score)),
        kl=_kl_coefficient(ppo.kl, progress.kl_coefficient),
        mismatch=mismatch,
        sampling=_sampling(experiment),
        ppo=ppo,
        learner=experiment.learner,
        seed=experiment.seed,
        demonstrations=context.datasets.demonstrations,
        max_staleness=experiment.rollouts.max_staleness,
        stop=context.stop,
        step=progress.step,
    )


def _kl_coefficient(kl: KlSettings, value: float) -> KlCoefficient:
    return FixedKl(value) if kl.target is None else AdaptiveKl(value, kl.target, kl.horizon)


def _build_learners_and_pool(context: StageContext, blueprint: Blueprint, stack: ExitStack) -> tuple[PpoLearners, Pool]:
    """Learners and pool, each in this process or in Ray actors.

    In one process they share the base model, but not at ZeRO 3, which gathers weights for the learner's forward passes
    only.
    """
    experiment = context.experiment
    learners: PpoLearners
    pool: Pool
    if experiment.rollouts.workers == 0 and experiment.learner.ranks == 0 and experiment.learner.zero < 3:
        learners, pool = _shared_learners_and_pool(context, blueprint)
    else:
        pool = _build_pool(context, stack)
        learners = _build_learners(context, blueprint)
    stack.callback(learners.close)
    return learners, pool


def _shared_learners_and_pool(context: StageContext, blueprint: Blueprint) -> tuple[PpoLearners, LocalPool]:
    experiment = context.experiment
    roles = build_roles(blueprint, experiment.ppo.active_critic, (SAMPLER_ROLE,))
    engine = make_transformers_engine(roles.trunk, context.tokenizer, experiment.rollouts)
    pool = LocalPool(engine, experiment.rollouts.effective_chunk_size)
    learners = local_learners(
        roles=roles,
        ppo=experiment.ppo,
        learner=experiment.learner,
        temperature=experiment.rollouts.temperature,
        gradient_checkpointing=experiment.model.gradient_checkpointing,
    )
    return learners, pool


def _build_pool(context: StageContext, stack: ExitStack) -> Pool:
    """A pool with its own base model."""
    experiment = context.experiment
    rollouts = experiment.rollouts
    if not rollouts.workers:
        engine = build_engine(experiment.model, experiment.policy, rollouts)
        return LocalPool(engine, rollouts.effective_chunk_size)
    from rollouts.ray_pool import PoolSettings, RayPool  # Ray is slow to import

    actors = context.actors(WORKER, rollouts.workers)
    if rollouts.engine == "vllm":
        # torch refuses some of vLLM's kernels, which it does not know to be deterministic.
        actors = [replace(actor, compute=replace(actor.compute, deterministic=False)) for actor in actors]
        rollouts = vllm_within_share(rollouts, min(actor.gpus for actor in actors))
    workers = RayPool(
        build=partial(build_watched, partial(build_engine, experiment.model, experiment.policy, rollouts)),
        settings=PoolSettings(
            chunk_size=rollouts.effective_chunk_size,
            timeout=rollouts.timeout,
            straggler_factor=rollouts.straggler_factor,
        ),
        actors=actors,
        await_room=context.reservation.await_room if context.reservation else None,
    )
    pool: Pool = workers
    if rollouts.max_staleness:
        pool = PartialRollouts(workers) if rollouts.segment_tokens else AsyncRollouts(workers)
    stack.callback(pool.close)
    return pool


def vllm_within_share(rollouts: RolloutSettings, gpus: float) -> RolloutSettings:
    """Limit vLLM's memory by a worker's share of a GPU, unless the user has set it.

    Args:
        rollouts: The settings.
        gpus: GPUs of a worker; only a share of one limits anything.
    """
    if not 0 < gpus < 1 or "gpu_memory_utilization" in rollouts.vllm:
        return rollouts
    arguments = rollouts.vllm | {"gpu_memory_utilization": VLLM_UTILIZATION * gpus}
    return rollouts.model_copy(update={"vllm": arguments})


def _build_learners(context: StageContext, blueprint: Blueprint) -> PpoLearners:
    """Learners with their own base model."""
    experiment = context.experiment
    temperature = experiment.rollouts.temperature
    if not experiment.learner.ranks:
        return local_learners(
            roles=build_roles(blueprint, experiment.ppo.active_critic),
            ppo=experiment.ppo,
            learner=experiment.learner,
            temperature=temperature,
            gradient_checkpointing=experiment.model.gradient_checkpointing,
        )
    return ray_learners(
        blueprint=blueprint,
        ppo=experiment.ppo,
        learner=experiment.learner,
        temperature=temperature,
        actors=context.actors(RANK, experiment.learner.ranks),
    )


def _resume(context: StageContext, learners: PpoLearners) -> tuple[PpoProgress, list[SavedBatch]]:
    """Restore the last checkpoint, if there is one.

    Returns:
        The progress of PPO, and the batches that were being generated.
    """
    experiment = context.experiment
    products = product_digests(context.run)
    checkpoint = latest(context.run.checkpoints("ppo"))
    if checkpoint is None:
        return _progress_at_start(experiment, products), []
    progress = read_progress(checkpoint, products)
    adapters, heads = trained_roles(experiment.ppo.active_critic)
    states = read_states(checkpoint, experiment.policy, adapters, heads, progress.ranks)
    learners.restore(states, progress.zero)
    progress.ranks = experiment.learner.ranks
    progress.zero = experiment.learner.zero
    return progress, read_pending(checkpoint, experiment.policy, progress)


def _progress_at_start(experiment: Experiment, products: dict[str, str]) -> PpoProgress:
    return PpoProgress(
        step=0,
        kl_coefficient=experiment.ppo.kl.coefficient,
        best_step=0,
        best=None,
        reward={},
        stop=[],
        stopped=None,
        seconds=0.0,
        ranks=experiment.learner.ranks,
        zero=experiment.learner.zero,
        pending=[],
        products=products,
    )
