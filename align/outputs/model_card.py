"""The model card of what a run exports."""

from typing import Any

from align.config.schema import DataSettings, Experiment
from align.evaluation.tables import FIGURES
from align.runs.folder import RunFolder, read_facts


def model_card(experiment: Experiment, run: RunFolder, what: str, notes: list[str]) -> str:
    """README.md of an exported folder: what it is, what it was made from, and how it did.

    what: `adapter`, `model` or `reward model`. notes: what the export has to say besides, a line each.
    """
    lines = [
        "---",
        f"base_model: {experiment.model.path}",
        f"library_name: {'peft' if what == 'adapter' else 'transformers'}",
        "tags: [align-rlhf]",
        "---",
        "",
        f"# {experiment.name}",
        "",
        f"The {what} of run `{experiment.name}`, on `{experiment.model.path}`, by align.",
        *notes,
        "",
        "| stage | what | seconds |",
        "|---|---|---|",
        *(f"| {name} | {text} | {seconds} |" for name, text, seconds in _stages(experiment, run)),
        "",
        *_data(experiment.data),
    ]
    if evaluation := run.read_evaluation():
        lines += ["", *_figures(evaluation)]
    return "\n".join(lines) + "\n"


def _stages(experiment: Experiment, run: RunFolder) -> list[tuple[str, str, str]]:
    texts = {
        "sft": f"{experiment.policy.method}, {experiment.sft.epochs:g} epochs",
        "reward": f"{experiment.reward.epochs:g} epochs",
        "ppo": f"{experiment.ppo.estimator}, {experiment.ppo.steps} steps of {experiment.ppo.batch_size} episodes, "
        f"KL coefficient {experiment.ppo.kl.coefficient:g} in the {experiment.ppo.kl.where}",
    }
    folders = {"sft": run.sft, "reward": run.reward, "ppo": run.policy}
    return [
        (name, text, f"{read_facts(folders[name]).get('seconds', 0):.0f}")
        for name, text in texts.items()
        if folders[name].is_dir()
    ]


def _data(data: DataSettings) -> list[str]:
    named = [(name, getattr(data, name)) for name in type(data).model_fields]
    return [f"* `data.{name}`: {source.path}" for name, source in named if hasattr(source, "path")]


def _figures(evaluation: dict[str, Any]) -> list[str]:
    sides = [side for side in ("reference", "policy", "best_of") if side in evaluation]
    lines = [f"| held out | {' | '.join(sides)} |", "|---" * (len(sides) + 1) + "|"]
    for key, label, form in FIGURES:
        cells = [form.format(evaluation[side][key]) if key in evaluation[side] else "" for side in sides]
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines
