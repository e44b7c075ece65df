"""Finds the trained models of a run."""

from collections.abc import Sequence
from pathlib import Path

from align.config.schema import Experiment
from align.roles.build import SFT_ROLE, build_sft_trunk
from align.runs.folder import RunFolder, read_facts
from align.runs.products import missing_product, wanted_stages
from policies.errors import UserError
from policies.files.adapters import load_adapter
from policies.scaling import ScaledAdapter, scale_adapter
from policies.trunk import AdapterWeights
from rewards.model import member_folder, members_in
from rewards.terms.process import STEP_LABELS


def policy_folder(experiment: Experiment, run: RunFolder) -> Path:
    """The folder of the run's policy, or of its SFT model if PPO has not finished.

    Raises:
        UserError: The run has neither.
    """
    for folder in (run.policy, run.sft):
        if folder.is_dir():
            return folder
    raise missing_product(experiment, run, "sft" if "sft" in wanted_stages(experiment) else "ppo")


def policy_weights(experiment: Experiment, run: RunFolder) -> AdapterWeights:
    """The adapter in `policy_folder`."""
    return load_adapter(policy_folder(experiment, run), experiment.policy)


def scaled_policies(experiment: Experiment, run: RunFolder, scales: Sequence[float]) -> list[ScaledAdapter]:
    """The adapters at reference + scale · (policy - reference); at 1, that of `policy_folder`.

    Raises:
        UserError: The run has no policy; or it is scaled, and its method does not allow it, or training is not done.
    """
    policy = policy_weights(experiment, run)
    if all(scale == 1 for scale in scales):
        return [ScaledAdapter(experiment.policy, policy)] * len(scales)
    if not run.policy.is_dir():
        raise missing_product(experiment, run, "ppo")
    if run.sft.is_dir():
        reference = load_adapter(run.sft, experiment.policy)
    else:
        trunk = build_sft_trunk(experiment.model, experiment.policy, experiment.seed, "reference")
        reference = trunk.read_adapter(SFT_ROLE)
    return [scale_adapter(experiment.policy, reference, policy, scale) for scale in scales]


def scaled_policy(experiment: Experiment, run: RunFolder, scale: float) -> ScaledAdapter:
    """The adapter at one scale, see `scaled_policies`."""
    return scaled_policies(experiment, run, [scale])[0]


def reward_folder(experiment: Experiment, run: RunFolder, member: int | None) -> Path:
    """The folder of the run's reward model, or of one member of an ensemble.

    Raises:
        UserError: The run has no reward model of its own, or no such member, or several and none was chosen.
    """
    if not run.reward.is_dir():
        raise missing_product(experiment, run, "reward")
    facts = read_facts(run.reward)
    if STEP_LABELS in facts:
        raise UserError(
            f"the reward model of run {run.path} was trained on labels of steps: it is read inside a response, and a "
            "sequence classifier is not"
        )
    if classifier := facts.get("classifier"):
        raise UserError(f"the reward of run {run.path} is the model {classifier} itself: there is nothing to export")
    members = members_in(run.reward)
    if member is None and members > 1:
        raise UserError(
            f"{run.reward} holds an ensemble: choose --member 0 to {members - 1}, or average them by `align average`"
        )
    if member is not None and member > 0 and members == 1:
        raise UserError(f"--member {member}: {run.reward} has one member, 0")
    if member is not None and member >= members:
        raise UserError(f"--member {member}: {run.reward} holds {members}, counted from 0")
    return member_folder(run.reward, member or 0)


def classifier_folder(experiment: Experiment, run: RunFolder) -> Path:
    """The folder of the run's classifier. Raises UserError where the run has none."""
    if not run.done("classify"):
        raise missing_product(experiment, run, "classify")
    return run.product("classify")
