"""The stages in order: each is done when its folder is there, so that running them again goes on where they stopped."""

import logging
import math
from typing import Any

from transformers import PreTrainedTokenizerBase

from align.config.schema import STAGES, Experiment
from align.data.datasets import Datasets, read_datasets
from align.evaluation.prompt_styles import make_prompt_style
from align.resources.ray_cluster import compute_settings
from align.runs.checkpoint import latest, step_of
from align.runs.folder import RunFolder, folder_of, read_facts
from align.runs.tracking import open_tracker, truncate_after
from align.runtime.atomic_files import write_json
from align.runtime.failures import RankLost
from align.runtime.signals import StopRequest
from align.scoring.build import check_term
from align.stages.context import StageContext
from align.stages.ppo import policy_figures, run_ppo
from align.stages.reward import run_reward
from align.stages.sft import run_sft
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.files.base_model import check_model_folder, check_weights, load_model_config, load_tokenizer
from rewards.diagnostics import ACCURACY
from rewards.model import member_folder, members_in, read_heads
from rewards.terms import columns_of
from rewards.user_functions import load_function

log = logging.getLogger(__name__)

RUNNERS = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo}


def stages_left(experiment: Experiment, run: RunFolder) -> list[str]:
    """The stages that must still run, in order; one whose product is given runs too, and only takes it over."""
    wanted = set(experiment.stages)
    if experiment.sft.adapter:
        wanted.add("sft")
    if experiment.reward.model or experiment.reward.classifier:
        wanted.add("reward")
    if not experiment.reward.has_model:
        wanted.discard("reward")
    elif "ppo" in wanted and "reward" not in wanted and not run.done("reward"):
        raise UserError("ppo needs a reward: add `reward` to `stages`, or set reward.model or reward.classifier")
    return [stage for stage in STAGES if stage in wanted and not run.done(stage)]


def load_datasets(experiment: Experiment) -> Datasets:
    """Check all that the experiment names, and read all rows that it needs, before anything is trained."""
    tokenizer = load_tokenizer(experiment.model.path)
    config = load_model_config(experiment.model.path)
    check_weights(experiment.model.path)
    stages_left(experiment, folder_of(experiment))
    _check_given(experiment)
    context = getattr(config, "max_position_embeddings", None)
    datasets = read_datasets(experiment, tokenizer, context)
    _check_prompt_styles(experiment, tokenizer, datasets, context)
    _check_columns(experiment, datasets)
    return datasets


def _check_columns(experiment: Experiment, datasets: Datasets) -> None:
    """What the reward's terms read of a row must be in every one."""
    for name, term in experiment.reward.terms.items():
        for column in columns_of(term):
            for request in (*datasets.prompts, *datasets.prompts_heldout):
                if column not in request.columns:
                    there = ", ".join(request.columns) or "none"
                    raise UserError(
                        f"reward.terms.{name} reads the column {column!r}, which a row of data.prompts or "
                        f"data.prompts_heldout lacks; it has {there}"
                    )


def _check_prompt_styles(
    experiment: Experiment, tokenizer: PreTrainedTokenizerBase, datasets: Datasets, context: int | None
) -> None:
    room = math.inf if context is None else context - experiment.rollouts.max_new_tokens
    for name, settings in experiment.evaluation.prompt_styles.items():
        style = make_prompt_style(settings, tokenizer)
        try:
            longest = max((len(style(request).prompt_ids) for request in datasets.prompts_heldout), default=0)
        except ValueError as error:
            raise UserError(f"evaluation.prompt_styles.{name}: a prompt cannot be put so: {error}") from error
        if longest > room:
            raise UserError(
                f"evaluation.prompt_styles.{name}: a prompt has {longest} tokens, more than the model's context less "
                f"rollouts.max_new_tokens, {room}"
            )


def _check_given(experiment: Experiment) -> None:
    if experiment.sft.adapter:
        load_adapter(experiment.sft.adapter, experiment.policy)
    if experiment.reward.model:
        wanted, there = experiment.reward.ensemble.members, members_in(experiment.reward.model)
        if wanted and wanted > there:
            raise UserError(f"reward.ensemble.members is {wanted}, and {experiment.reward.model} holds {there}")
        for member in range(wanted or there):
            folder = member_folder(experiment.reward.model, member)
            load_adapter(folder, experiment.policy)
            read_heads(folder, experiment.reward.weights)
    if experiment.reward.classifier:
        check_model_folder(experiment.reward.classifier)
        check_weights(experiment.reward.classifier)
    if "ppo" in experiment.stages:
        for name, term in experiment.reward.terms.items():
            check_term(name, term)
    if experiment.evaluation.gold:
        load_function(experiment.evaluation.gold, "evaluation.gold")


def run_stages(experiment: Experiment, run: RunFolder, datasets: Datasets, stop: StopRequest) -> dict[str, Any]:
    """Run what is left, write `evaluation.json` and return it. Raises Interrupted if asked to stop in between."""
    left = stages_left(experiment, run)
    compute_settings(experiment, 1).apply()
    if left:
        _forget_beyond_checkpoint(run, left[0])
    tokenizer = load_tokenizer(experiment.model.path)
    with open_tracker(run.path, experiment.tracking, experiment.name, experiment.model_dump(mode="json")) as tracker:
        context = StageContext(experiment, run, tokenizer, datasets, tracker, stop)
        for stage in left:
            _run_stage(context, stage)
    evaluation = _evaluation(run)
    write_json(run.evaluation, evaluation)
    return evaluation


def reopen(experiment: Experiment, run: RunFolder) -> None:
    """Let PPO that came to its last step go on where more steps are asked for now."""
    last = latest(run.checkpoints("ppo"))
    if last and run.done("ppo") and step_of(last) < experiment.ppo.steps and "stopped" not in read_facts(run.policy):
        run.policy.rename(run.best)


def _run_stage(context: StageContext, stage: str) -> None:
    """Run a stage to its end. Where a rank of the learner dies, go on from the last checkpoint with new ones."""
    for left in reversed(range(context.experiment.learner.restarts + 1)):
        try:
            return RUNNERS[stage](context)
        except RankLost as error:
            if not left:
                raise
            log.warning("%s; going on from the last checkpoint, %d times more if need be", error, left - 1)
            _forget_beyond_checkpoint(context.run, stage)


def _forget_beyond_checkpoint(run: RunFolder, stage: str) -> None:
    """Drop metrics of steps that will be run again."""
    last = latest(run.checkpoints(stage))
    truncate_after(run.path, stage, step_of(last) if last else 0)


def _evaluation(run: RunFolder) -> dict[str, Any]:
    products = {"sft": run.sft, "reward": run.reward, "ppo": run.policy}
    facts = {stage: read_facts(folder) for stage, folder in products.items() if folder.is_dir()}
    evaluation: dict[str, Any] = {}
    if "accuracy" in facts.get("reward", {}):
        evaluation["reward_model"] = {name: facts["reward"][name] for name in ACCURACY}
    if "ppo" in facts:
        evaluation |= policy_figures(run)
    return evaluation | {"seconds": {stage: round(known["seconds"], 1) for stage, known in facts.items()}}
