"""Runs the stages in order. A stage is done once its folder exists, so running again resumes where a run stopped."""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.schema import Experiment
from align.config.stage import all_stages, find_stage
from align.data.datasets import Datasets, context_length, read_datasets
from align.evaluation.prompt_styles import PromptStyle
from align.ppo.environment import environment_function
from align.resources.actors import actors_by_stage, most_actors, reserved_cpus
from align.resources.peak_memory import PeakMemory
from align.resources.ray_cluster import compute_settings, head_address, ray_cluster
from align.runs.checkpoint import latest, prune, step_of
from align.runs.folder import RunFolder, folder_of, read_facts
from align.runs.lineage import evaluation_product, stage_products
from align.runs.products import wanted_stages
from align.runs.tracking import open_tracker, truncate_after
from align.runtime.atomic_files import write_json
from align.runtime.failures import Fault, MicrobatchTooLarge, RankLost
from align.runtime.garbage import no_collections
from align.runtime.head_watch import await_head
from align.runtime.shadowing import package_hidden_from_workers
from align.runtime.signals import Interrupted, StopRequest
from align.scoring.reward import gold_function
from align.stages.context import StageContext
from align.stages.microbatch_size import halve_size, setting_of
from align.stages.perplexity import measure_perplexity
from policies.device import free_memory
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.files.base_model import check_model_folder, check_weights, load_model_tokenizer
from policies.text.encoder import TextEncoder
from rewards.model import member_folder, members_in, read_heads
from rewards.terms.model import check_reads_responses
from rewards.terms.process import check_reads_steps

log = logging.getLogger(__name__)


def remaining_stages(experiment: Experiment, run: RunFolder) -> list[str]:
    """The stages that still have to run, in order. A stage with a ready-made product runs too, and only adopts it.

    Raises:
        UserError: PPO has no reward: neither this run nor a ready-made model provides it.
    """
    wanted = wanted_stages(experiment)
    if experiment.reward.has_model and "ppo" in wanted and "reward" not in wanted and not run.done("reward"):
        raise UserError("ppo needs a reward: add `reward` to `stages`, or set reward.model or reward.classifier")
    return [stage for stage in wanted if not run.done(stage)]


@no_collections()
def load_datasets(experiment: Experiment) -> Datasets:
    """Check everything that the experiment refers to, and read all its data, before anything is trained.

    Raises:
        UserError: A model, adapter, function, source or row cannot be used.
    """
    tokenizer = load_model_tokenizer(experiment.model)
    if experiment.model.architecture is None:  # the weights of a base that is made are align's own; a plan has none
        check_weights(experiment.model.path)
    remaining_stages(experiment, folder_of(experiment))  # raises where PPO would have no reward
    _check_ready_made(experiment)
    _check_workers(experiment)
    max_positions = context_length(experiment)
    datasets = read_datasets(experiment, tokenizer, max_positions)
    _check_prompt_styles(experiment, tokenizer, datasets, max_positions)
    _check_columns(experiment, datasets)
    return datasets


def _check_columns(experiment: Experiment, datasets: Datasets) -> None:
    """Every prompt must have the columns that the reward's terms read."""
    for name, term in experiment.reward.terms.items():
        for column in term.columns:
            for request in (*datasets.prompts, *datasets.prompts_heldout):
                if column not in request.columns:
                    columns = ", ".join(request.columns) or "none"
                    raise UserError(
                        f"reward.terms.{name} reads the column {column!r}, which a row of data.prompts or "
                        f"data.prompts_heldout lacks; it has {columns}"
                    )


def _check_prompt_styles(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, max_positions: int | None
) -> None:
    max_prompt = math.inf if max_positions is None else max_positions - experiment.rollouts.max_new_tokens
    for name, settings in experiment.evaluation.prompt_styles.items():
        style = PromptStyle(settings, TextEncoder(tokenizer, experiment.data.special_tokens))
        try:
            longest = max((len(style.ask(request).prompt_ids) for request in datasets.prompts_heldout), default=0)
        except ValueError as error:
            raise UserError(f"evaluation.prompt_styles.{name}: a prompt cannot be put in this form: {error}") from error
        if longest > max_prompt:
            raise UserError(
                f"evaluation.prompt_styles.{name}: a prompt has {longest} tokens, more than the model's context length "
                f"less rollouts.max_new_tokens, {max_prompt}"
            )


def _check_ready_made(experiment: Experiment) -> None:
    """The adapter, models and functions that the experiment names must be usable."""
    if experiment.sft.adapter:
        load_adapter(experiment.sft.adapter, experiment.policy, experiment.sft.residual_base)
    if experiment.reward.model:
        _check_reward_folder(experiment, experiment.reward.model)
    if experiment.reward.classifier:
        check_model_folder(experiment.reward.classifier)
        check_weights(experiment.reward.classifier)
    if "ppo" in experiment.stages:
        for name, term in experiment.reward.terms.items():
            term.check(name)
    if experiment.rollouts.environment:
        environment_function(experiment.rollouts.environment).check()
    if experiment.evaluation.gold:
        gold_function(experiment.evaluation.gold).check()


def _check_workers(experiment: Experiment) -> None:
    """Ray's workers must find align's packages, and not files of the user by their names."""
    hidden = package_hidden_from_workers()
    if hidden and any(actors_by_stage(experiment).values()):
        raise UserError(f"{hidden}; rollout workers and learner ranks start in the current folder")


def _check_reward_folder(experiment: Experiment, folder: str) -> None:
    wanted = experiment.reward.ensemble.members
    members = members_in(folder)
    if wanted and wanted > members:
        raise UserError(f"reward.ensemble.members is {wanted}, and {folder} holds {members}")
    for member in range(wanted or members):
        path = member_folder(folder, member)
        load_adapter(path, experiment.policy)
        read_heads(path, experiment.reward.weights)
    where = f"reward.terms.{experiment.reward.model_term}"
    check = check_reads_steps if experiment.reward.process else check_reads_responses
    check(read_facts(Path(folder)), where)


def run_stages(experiment: Experiment, run: RunFolder, datasets: Datasets, stop: StopRequest) -> dict[str, Any]:
    """Run the remaining stages and write `evaluation.json`.

    Args:
        experiment: The settings.
        run: The folder that every stage writes to.
        datasets: The data that `load_datasets` read.
        stop: Checked after every step.

    Returns:
        The evaluation, as written.

    Raises:
        Interrupted: A stop was requested; the step is finished and a checkpoint written.
        Fault: Training cannot continue, for example because gradients are not finite.
    """
    compute_settings(experiment).apply()
    if remaining := remaining_stages(experiment, run):
        last = _return_to_checkpoint(run, remaining[0], experiment.checkpoint.keep)
        truncate_after(run.path, remaining[0], last)
        tokenizer = load_model_tokenizer(experiment.model)
        config = experiment.model_dump(mode="json")
        job_type = "-".join(experiment.stages)
        with open_tracker(run.path, experiment.tracking, experiment.name, config, job_type) as tracker:
            context = StageContext(
                experiment=experiment, run=run, tokenizer=tokenizer, datasets=datasets, tracker=tracker, stop=stop
            )
            _keep_products(context)
            with ExitStack() as stack:
                _run_remaining(context, remaining, stack)
            evaluation = _write_evaluation(experiment, run, datasets)
            if experiment.tracking.artifacts:
                tracker.keep(evaluation_product(experiment, run))
            return evaluation
    return _write_evaluation(experiment, run, datasets)


def _run_remaining(context: StageContext, stages: Sequence[str], stack: ExitStack) -> None:
    """Run stages, with the places of all their actors reserved.

    A cluster is joined before anything is trained: it may lack what a later stage needs. One on this machine is started
    for the first stage that has actors.
    """
    actors = actors_by_stage(context.experiment)
    starts_with = next((stage for stage in stages if actors.get(stage)), None)
    if starts_with and context.experiment.cluster.address_to_join:
        starts_with = stages[0]
    for stage in stages:
        if stage == starts_with:
            context = with_actors(context, stages, stack)
        _run_stage(replace(context, peaks=PeakMemory()), stage)
        _keep_products(context)


def _keep_products(context: StageContext) -> None:
    """Have the trackers keep the products of the stages that are done, unless they have them."""
    experiment = context.experiment
    if experiment.tracking.artifacts:
        for product in stage_products(experiment, context.run):
            context.tracker.keep(product)


def with_actors(context: StageContext, stages: Sequence[str], stack: ExitStack) -> StageContext:
    """Join the cluster, or start one, until the stack ends, and reserve places for the actors of some stages.

    Returns:
        The context with the reservation; without, where the stages have no actors.

    Raises:
        Interrupted: A stop was requested while the cluster had no room.
        UserError: The cluster cannot be joined or has no room, or a node lacks the model.
    """
    experiment = context.experiment
    actors = most_actors(experiment, stages)
    if not actors:
        return context
    cpus = reserved_cpus(experiment, actors)
    stack.enter_context(ray_cluster(experiment.cluster, cpus, context.run.how_to_resume))
    from align.resources.node_files import check_files_on_nodes  # Ray is slow to import
    from align.resources.reservation import reserve

    try:
        with context.stop.droppable():
            reservation = reserve(experiment, actors)
    except KeyboardInterrupt:
        if context.stop.dropped:
            raise Interrupted from None
        raise
    if experiment.cluster.address_to_join:
        check_files_on_nodes(experiment, {kind: reservation.nodes(kind) for kind in actors})
    return replace(context, reservation=reservation)


def reopen(experiment: Experiment, run: RunFolder) -> None:
    """Reopen a finished PPO stage where the settings now request more steps."""
    if can_reopen(experiment, run):
        run.policy.rename(run.best)


def can_reopen(experiment: Experiment, run: RunFolder) -> bool:
    """Whether PPO is done, and the settings now request more steps than it has run."""
    last = latest(run.checkpoints("ppo"))
    if last is None or not run.done("ppo"):
        return False
    return step_of(last) < experiment.ppo.steps and "stopped" not in read_facts(run.policy)


def _run_stage(context: StageContext, stage: str) -> None:
    """Run a stage to its end, and record a fault that ends it."""
    try:
        _run_and_resume(context, stage)
    except Fault as fault:
        context.tracker.event(stage, "fault", str(fault))
        raise


def _run_and_resume(context: StageContext, stage: str) -> None:
    """Run a stage to its end. It resumes from its last checkpoint where a rank dies or runs out of memory.

    With new ranks after a death: `learner.restarts` limits how often without having got as far as the next checkpoint.
    With microbatches of half the size where memory did not suffice.
    """
    runner = find_stage(stage).load_runner()
    restarts = 0
    resumed_from: int | None = None
    while True:
        try:
            return runner(context)
        except MicrobatchTooLarge as error:
            tokens = halve_size(context.run, stage, error)
            last = _return_to_checkpoint(context.run, stage, context.experiment.checkpoint.keep)
            text = f"{error}; resuming from the last checkpoint with {setting_of(stage)} {tokens}"
            _note_restart(context, stage, last, "out of memory", text)
        except RankLost as error:
            await_head(head_address(context.experiment.cluster))
            last = _return_to_checkpoint(context.run, stage, context.experiment.checkpoint.keep)
            if last != resumed_from:
                restarts = 0
            if restarts == context.experiment.learner.restarts:
                raise
            restarts += 1
            resumed_from = last
            left = context.experiment.learner.restarts - restarts
            text = f"{error}; resuming from the last checkpoint (further restarts allowed: {left})"
            _note_restart(context, stage, last, "rank lost", text)
        finally:
            free_memory()


def _note_restart(context: StageContext, stage: str, last: int, event: str, text: str) -> None:
    """Note that a stage is resumed from its checkpoint of step `last`, and drop what it has logged since."""
    log.warning("%s", text)
    context.tracker.drop_after(stage, last)
    context.tracker.event(stage, event, text)


def _return_to_checkpoint(run: RunFolder, stage: str, keep: int) -> int:
    """Remove what a stage that was killed had not removed of its older checkpoints.

    Returns:
        The step after which it is resumed; -1: from its beginning.
    """
    checkpoints = run.checkpoints(stage)
    last = latest(checkpoints)
    if last is None:
        return -1
    prune(checkpoints, keep, last)
    return step_of(last)


def _write_evaluation(experiment: Experiment, run: RunFolder, datasets: Datasets) -> dict[str, Any]:
    """Write `evaluation.json`, and return it: what the stages report and, on the texts that are set, perplexity."""
    evaluation = _evaluation(run)
    if datasets.texts:
        evaluation["perplexity"] = measure_perplexity(experiment, run, datasets)
    write_json(run.evaluation, evaluation)
    return evaluation


def _evaluation(run: RunFolder) -> dict[str, Any]:
    """What the stages that are done report, and their seconds."""
    evaluation: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for stage in all_stages():
        if run.done(stage.name):
            if report := stage.load_evaluation():
                evaluation |= report(run)
            seconds[stage.name] = round(read_facts(run.product(stage.name))["seconds"], 1)
    return evaluation | {"seconds": seconds}
