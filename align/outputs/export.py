"""Exports the trained models of a run for other programs."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from align.config.schema import Experiment
from align.outputs.artifacts import policy_folder, policy_weights, reward_folder, scaled_policy
from align.outputs.card_code import policy_code, reward_code
from align.outputs.classifier_export import export_classifier
from align.outputs.model_card import model_card
from align.runs.folder import RunFolder
from align.runtime.atomic_files import new_folder
from policies.errors import UserError
from policies.export import export_adapter, export_merged, export_reward
from policies.files.adapters import PROMPT, save_adapter
from policies.files.base_model import load_model_tokenizer
from policies.files.generation import valid_generation
from policies.files.prompt_table import add_task
from policies.schema import PolicySettings

Product = Literal["adapter", "model", "reward model", "classifier"]


class Exported(NamedTuple):
    """The result of an export.

    Attributes:
        product: What was written.
        difference: Largest difference between the outputs of the reloaded product and those of the run's model.
        changes: How the generation config differs from the base model's, for people.
    """

    product: Product
    difference: float
    changes: tuple[str, ...] = ()


def export_run(
    experiment: Experiment,
    run: RunFolder,
    to: Path,
    product: Product,
    dtype: str = "float32",
    member: int | None = None,
    scale: float = 1.0,
) -> Exported:
    """Write a trained model of a run to a folder, with tokenizer and model card, and compare it with the run's own.

    Args:
        experiment: The run's settings.
        run: The run.
        to: The folder to write; it must not exist.
        product: `adapter`: the policy's adapter. `model`: the complete policy, also if `adapter` is requested and the
            policy has none. `reward model` and `classifier`: a sequence classifier.
        dtype: Dtype of a complete policy's weights.
        member: Which reward model of an ensemble, counted from 0.
        scale: a of the policy, reference + a · (policy - reference).

    Returns:
        What was written, and the difference: of log-probabilities in nats, of scores, or of logits.

    Raises:
        UserError: The run does not have the product, or its method cannot export it.
        RuntimeError: The difference is larger than rounding explains.
    """
    model = experiment.model
    policy = experiment.policy
    tokenizer = load_model_tokenizer(model)
    if product == "adapter" and not policy.spec.shares_base:
        product = "model"
    notes = [] if scale == 1 else ["", f"The policy is reference + {scale:g} · (trained policy - reference)."]
    changes: tuple[str, ...] = ()
    if product in ("adapter", "model"):
        changes = valid_generation(model.path).changes
    code = ""
    with new_folder(to) as folder, TemporaryDirectory() as scratch:
        if product == "reward model":
            source = reward_folder(experiment, run, member)
            difference, bias = export_reward(model, policy, source=source, tokenizer=tokenizer, folder=folder)
            notes = ["", f"Its scores are the run's minus {bias:.6g}: a sequence classifier has no bias."]
            code = reward_code(experiment, tokenizer, bias)
        elif product == "classifier":
            difference, notes, code = export_classifier(experiment, run, tokenizer, folder)
        elif product == "model":
            source, policy = _scaled_source(experiment, run, scale, Path(scratch))
            difference = export_merged(model, policy, source=source, tokenizer=tokenizer, folder=folder, dtype=dtype)
            code = policy_code(experiment, tokenizer, is_adapter=False)
        else:
            source, policy = _scaled_source(experiment, run, scale, Path(scratch))
            difference = export_adapter(model, policy, source=source, tokenizer=tokenizer, folder=folder)
            if policy.spec.in_peft:
                code = policy_code(experiment, tokenizer, is_adapter=True)
            else:
                notes += ["", "PEFT does not have this method: `policies.build.build_trunk` loads the adapter."]
        notes += [f"\nGeneration config: {change}." for change in changes]
        (folder / "README.md").write_text(model_card(experiment, run, product, notes, code), encoding="utf-8")
    return Exported(product, difference, changes)


def _scaled_source(experiment: Experiment, run: RunFolder, scale: float, scratch: Path) -> tuple[Path, PolicySettings]:
    """A folder with the policy, and the settings that it fits; a scaled one is written to a scratch folder."""
    if scale == 1:
        return policy_folder(experiment, run), experiment.policy
    scaled = scaled_policy(experiment, run, scale)
    save_adapter(scratch, scaled.weights, scaled.settings, experiment.model.path)
    return scratch, scaled.settings


def export_prompt(experiment: Experiment, run: RunFolder, table: Path, task: str) -> None:
    """Add the soft prompt of a run's policy to a prompt table.

    Raises:
        UserError: The policy has no soft prompt, or the table already has this task or is for another base model.
    """
    prompt_kind = experiment.policy.spec.prompt_kind
    if prompt_kind is None:
        raise UserError(f"--task: policy.method {experiment.policy.method} trains no soft prompt")
    tokens = policy_weights(experiment, run)[PROMPT]
    add_task(table, task, tokens, {"base": experiment.model.path, "kind": prompt_kind})
