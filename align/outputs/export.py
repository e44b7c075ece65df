"""What a run has trained, for other programs."""

from pathlib import Path

from align.config.schema import Experiment
from align.outputs.model_card import model_card
from align.outputs.trained_run import policy_folder
from align.runs.folder import RunFolder, read_facts
from align.runtime.atomic_files import new_folder
from policies.errors import UserError
from policies.export import OWN, export_adapter, export_merged, export_reward
from policies.files.adapters import PROMPT, load_adapter
from policies.files.base_model import load_tokenizer
from policies.files.prompt_table import add_task
from policies.schema import SOFT
from rewards.model import member_folder, members_in


def export_run(
    experiment: Experiment, run: RunFolder, to: Path, what: str, dtype: str, member: int | None = None
) -> tuple[str, float]:
    """Write a run's `adapter`, `model` (whole, in dtype) or `reward model`, with tokenizer and card, to a new folder.

    A policy that was trained as a whole is a model in any case. member: which of an ensemble of reward models.
    Returns what was written, and by how much it differs, loaded afresh, from the live one. Raises UserError where the
    run or its method does not have it.
    """
    model, policy = experiment.model, experiment.policy
    tokenizer = load_tokenizer(model.path)
    if what == "adapter" and policy.method == "full":
        what = "model"
    notes: list[str] = []
    with new_folder(to) as folder:
        if what == "reward model":
            gap, bias = export_reward(model, policy, _reward_folder(run, member), tokenizer, folder)
            notes = ["", f"Scores are those of the run less {bias:.6g}, for which a classifier has no place."]
        elif what == "model":
            gap = export_merged(model, policy, policy_folder(run), tokenizer, folder, dtype)
        else:
            gap = export_adapter(model, policy, policy_folder(run), tokenizer, folder)
            if policy.method in OWN:
                notes = ["", "PEFT has no such adapter: `policies.methods.build_trunk` loads it."]
        (folder / "README.md").write_text(model_card(experiment, run, what, notes))
    return what, gap


def export_prompt(experiment: Experiment, run: RunFolder, table: Path, task: str) -> None:
    """Add the virtual tokens of a run's policy to a prompt table. Raises UserError where it has none."""
    if experiment.policy.method not in SOFT:
        raise UserError(f"--task: policy.method {experiment.policy.method} trains no soft prompt")
    kind = "keys and values" if experiment.policy.method == "prefix_tuning" else "embeddings"
    tokens = load_adapter(policy_folder(run), experiment.policy)[PROMPT]
    add_task(table, task, tokens, {"base": experiment.model.path, "kind": kind})


def _reward_folder(run: RunFolder, member: int | None) -> Path:
    if not run.reward.is_dir():
        raise UserError(f"run {run.path} has no reward/ yet: `align resume {run.path}` goes on with it")
    if classifier := read_facts(run.reward).get("classifier"):
        raise UserError(f"the reward of run {run.path} is the ready model {classifier}: there is nothing to export")
    members = members_in(run.reward)
    if member is None and members > 1:
        raise UserError(
            f"{run.reward} holds an ensemble: give --member 0 to {members - 1}, or the mean of all by `align average`"
        )
    if member is not None and member >= members:
        raise UserError(f"--member {member}: {run.reward} holds {members}, counted from 0")
    return member_folder(run.reward, member or 0)
