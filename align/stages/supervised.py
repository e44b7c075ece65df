"""Trains the objective of a supervised stage on its ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from align.learner.group import LocalRank, Ranks
from align.resources.actors import RANK
from align.runtime.seeds import seed_for
from align.stages.context import StageContext
from align.stages.microbatch_size import keep_size
from align.supervised.fit import FitContext, FitResult, finished, fit
from align.supervised.learner import SupervisedLearner, SupervisedLearners, build_learner
from align.supervised.objective import Objective
from policies.device import free_memory
from rewards.schema import FitSettings


def train(
    context: StageContext,
    build_objective: Callable[[], Objective[Any]],
    lengths: Sequence[int],
    settings: FitSettings,
    fit_context: FitContext,
) -> FitResult:
    """Train an objective, or resume its training; nothing is loaded where it has ended.

    Ray must be running where there are ranks.

    Args:
        context: The run in progress.
        build_objective: Loads the base model and builds the objective, in the process of each rank.
        lengths: The length of each training example, in tokens.
        settings: The settings of the training run.
        fit_context: Its context.

    Returns:
        The result; the weights are those of `fitted_weights`.
    """
    if result := finished(fit_context):
        return result
    build = partial(
        build_learner,
        build_objective=build_objective,
        settings=settings,
        zero=fit_context.zero,
        seed=seed_for(fit_context.seed, fit_context.stage),
        gradient_checkpointing=context.experiment.model.gradient_checkpointing,
    )
    result = _fit_and_close(context, build, lengths, settings, fit_context)
    free_memory()
    return result


def _fit_and_close(
    context: StageContext,
    build: Callable[[], SupervisedLearner],
    lengths: Sequence[int],
    settings: FitSettings,
    fit_context: FitContext,
) -> FitResult:
    learners = SupervisedLearners(_start(context, build, fit_context.ranks))
    try:
        keep_size(context.run, fit_context.stage, learners.tokens_per_microbatch())
        result = fit(learners, lengths, settings, fit_context)
        context.peaks.note(RANK, learners.ranks.peak_memory())
        return result
    finally:
        learners.close()


def _start(context: StageContext, build: Callable[[], SupervisedLearner], ranks: int) -> Ranks[SupervisedLearner]:
    """Start the ranks, in Ray actors or one in this process."""
    if not ranks:
        return LocalRank(build)
    from align.learner.ray_ranks import RayRanks  # Ray is slow to import

    return RayRanks(build, context.actors(RANK, ranks))
