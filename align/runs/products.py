"""The stages that an experiment needs, and what to do where a run has not run one of them."""

from align.config.schema import Experiment
from align.config.stage import find_stage, stage_names
from align.runs.folder import RunFolder, is_locked
from policies.errors import UserError


def wanted_stages(experiment: Experiment) -> list[str]:
    """The stages of an experiment, in order. A stage with a ready-made product is one of them, and only adopts it."""
    wanted = set(experiment.stages)
    wanted.update(stage for stage in stage_names() if ready_made(experiment, stage))
    if not experiment.reward.has_model:
        wanted.discard("reward")
    return [stage for stage in stage_names() if stage in wanted]


def ready_made(experiment: Experiment, stage: str) -> str | None:
    """The ready-made product that a stage adopts; None where it trains its own."""
    if stage == "sft":
        return experiment.sft.adapter
    if stage == "reward":
        return experiment.reward.model or experiment.reward.classifier
    return None


def state_of(experiment: Experiment, run: RunFolder) -> str:
    """`running` where a process has locked the run; otherwise `done` or `stopped`, by whether all stages are done."""
    if is_locked(run):
        return "running"
    return "done" if all(run.done(stage) for stage in wanted_stages(experiment)) else "stopped"


def missing_product(experiment: Experiment, run: RunFolder, stage: str) -> UserError:
    """The error where something needs a stage that the run has not finished: what to do about it.

    Args:
        experiment: The run's settings.
        run: The run.
        stage: The stage whose product is missing.
    """
    folder = find_stage(stage).folder
    stages = wanted_stages(experiment)
    if stage in stages:
        return UserError(f"run {run.path} has no {folder}/ yet: `align resume {run.path}` resumes it")
    if stage == "reward" and not experiment.reward.has_model:
        terms = ", ".join(experiment.reward.terms) or "none"
        return UserError(f"run {run.path} has no reward model: its reward is made of other terms ({terms})")
    ways = []
    if run.done("sft"):
        ways.append(f"`align generate {run.path}` samples from its SFT model")
    if run.done("reward") and stage != "reward":
        ways.append(f"`align eval {run.path} --reward` evaluates its reward model")
    ways.append(f"{_commands(experiment, run, stage)} EXPERIMENT` with its experiment file adds {folder}/ to it")
    return UserError(
        f"run {run.path} has no {folder}/, because it ends after the stages {', '.join(stages)}: {'; '.join(ways)}"
    )


def _commands(experiment: Experiment, run: RunFolder, stage: str) -> str:
    """The commands of a stage and of the reward stage that PPO needs before it, up to their last argument."""
    if stage == "ppo" and experiment.reward.has_model and not run.done("reward"):
        return "`align reward EXPERIMENT` and then `align ppo"
    return f"`align {stage}"
