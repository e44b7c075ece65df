"""The model card of an exported adapter or model."""

from typing import Any

from align.config.schema import DataSettings, Experiment, SourceSettings
from align.config.stage import all_stages
from align.evaluation.tables import figure_rows, label_rows
from align.runs.folder import RunFolder, read_facts
from align.runtime.wording import counted


def model_card(experiment: Experiment, run: RunFolder, product: str, notes: list[str], code: str = "") -> str:
    """The text of README.md in an exported folder: contents, origin and results.

    Args:
        experiment: The run's settings.
        run: The run.
        product: `adapter`, `model`, `reward model` or `classifier`.
        notes: Further lines about this export.
        code: How to use it, in Python.
    """
    lines = [
        "---",
        f"base_model: {experiment.model.path}",
        f"library_name: {'peft' if product == 'adapter' else 'transformers'}",
        "tags: [align-rlhf]",
        "---",
        "",
        f"# {experiment.name}",
        "",
        f"The {product} of run `{experiment.name}`, on `{experiment.model.path}`, by align.",
        *_template(experiment),
        *notes,
        *(["", "```python", *code.splitlines(), "```"] if code else []),
        "",
        "| stage | what | seconds |",
        "|---|---|---|",
        *_stages(experiment, run),
        "",
        *_data(experiment.data),
    ]
    if evaluation := run.read_evaluation():
        lines += ["", *_figures(evaluation, product)]
    return "\n".join(lines) + "\n"


def _template(experiment: Experiment) -> list[str]:
    """A line on a chat template that is not the base model's own."""
    name = experiment.model.chat_template
    return [] if name is None else ["", f"Its tokenizer has the chat template `{name}`, not one of the base model."]


def _stages(experiment: Experiment, run: RunFolder) -> list[str]:
    """A table row per finished stage."""
    ppo = experiment.ppo
    texts = {
        "sft": f"{experiment.policy.method}, {counted(experiment.sft.epochs, 'epoch')}",
        "classify": counted(experiment.classify.epochs, "epoch"),
        "reward": counted(experiment.reward.epochs, "epoch"),
        "dpo": f"{experiment.dpo.loss}, β {experiment.dpo.effective_beta:g}, {counted(experiment.dpo.epochs, 'epoch')}",
        "ppo": f"{ppo.estimator}, {counted(ppo.steps, 'step')} of {counted(ppo.batch_size, 'episode')}, "
        f"KL coefficient {ppo.kl.coefficient:g} in the {ppo.kl.where}",
    }
    rows = []
    for stage in all_stages():
        if run.done(stage.name):
            seconds = read_facts(run.product(stage.name)).get("seconds", 0)
            rows.append(f"| {stage.name} | {texts.get(stage.name, stage.summary)} | {seconds:.0f} |")
    return rows


def _data(data: DataSettings) -> list[str]:
    """A list item per data source that is set."""
    items = []
    for name in type(data).model_fields:
        source = getattr(data, name)
        if isinstance(source, SourceSettings):
            items.append(f"* `data.{name}`: {source.path}")
    return items


def _figures(evaluation: dict[str, Any], product: str) -> list[str]:
    """The evaluation of a product as a Markdown table."""
    if product == "classifier":
        rows = [f"| {label} | {cell} |" for label, cell in label_rows(evaluation["classifier"])]
        return ["| held out | classifier |", "|---|---|", *rows]
    names = [name for name in ("reference", "policy", "best_of") if name in evaluation]
    lines = [f"| held out | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for label, cells in figure_rows([evaluation[name] for name in names]):
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines
