"""Makes the experiment that a choice starts with: a recipe on the user's data, sized for its rows and the machine."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from align.choice.recipes import Recipe
from align.choice.survey import Machine, Survey
from align.config.schema import Experiment, SourceSettings
from align.config.stage import section_of
from align.data.datasets import Datasets, context_length
from align.resources.gpu_fit import USABLE
from align.resources.memory import estimate_memory, measure
from align.resources.tensor_uses import bytes_by_gpu
from align.stages.pipeline import load_datasets
from policies.errors import UserError

UNLIMITED = 4096
"""Tokens of a sequence where the model's configuration does not limit them."""
MAX_NEW_TOKENS = 256
"""Tokens of a response that PPO samples, where half of the model's context is not less."""
MULTIPLE = 64
"""Limits of tokens are multiples of it."""

SettingsTree = dict[str, Any]
"""Settings as in an experiment file."""


def starting_experiment(
    recipe: Recipe, survey: Survey, name: str, model: str, machine: Machine
) -> tuple[SettingsTree, bool]:
    """The settings of a recipe on the data of a survey.

    Args:
        recipe: The recipe.
        survey: The data; it has the rows that the recipe needs.
        name: The name of the run.
        model: Folder or hub name of the base model.
        machine: The memory of each process.

    Returns:
        The settings that differ from the defaults, and whether the processes fit, by the plan.

    Raises:
        UserError: Something that the experiment refers to cannot be used.
    """
    values = _values(recipe, survey, name, model)
    _give_room(values)
    datasets = load_datasets(_checked(values))
    _limit_tokens(values, datasets)
    for method in recipe.methods:
        values["policy"]["method"] = method
        if fits(_checked(values), machine):
            return values, True
    values["policy"]["method"] = recipe.methods[-1]
    return values, False


def recipe_fits(recipe: Recipe, model: str, machine: Machine) -> bool:
    """Whether a recipe fits the memory of a machine with one of its methods, on rows of the default length."""
    for method in recipe.methods:
        values = {"name": "fits", "stages": list(recipe.stages), "model": {"path": model}, "policy": {"method": method}}
        if fits(_checked(values), machine):
            return True
    return False


def fits(experiment: Experiment, machine: Machine) -> bool:
    """Whether every process of an experiment fits the memory of the machine, by the plan."""
    sizes = measure(experiment.model, experiment.policy)
    uses = estimate_memory(experiment, list(experiment.stages), sizes, machine.gpu_bytes)
    return max(bytes_by_gpu(experiment, uses).values()) <= USABLE * machine.bytes


def _values(recipe: Recipe, survey: Survey, name: str, model: str) -> SettingsTree:
    """The recipe on the user's files, before its limits of tokens are set."""
    sources = {source: _source(survey, recipe, source) for source in recipe.sources}
    stages = list(recipe.stages)
    if recipe.after_sft and "demonstrations" in survey.sources:
        stages = ["sft", *stages]
        sources = {"demonstrations": _source_values(survey.sources["demonstrations"]), **sources}
    values: SettingsTree = {
        "name": name,
        "stages": stages,
        "model": {"path": model},
        "policy": {"method": recipe.methods[0]},
        "data": sources,
    }
    for key, value in recipe.settings.items():
        _set(values, key, value)
    if "ppo" in stages and "reward" not in stages:
        _set(values, "reward.terms", {"answer": survey.answer_term})
    return values


def _source(survey: Survey, recipe: Recipe, name: str) -> Any:
    """The first kind of rows that a source can be read from and that exists."""
    kind = next(kind for kind in recipe.sources[name] if kind in survey.sources)
    return _source_values(survey.sources[kind])


def _source_values(source: SourceSettings) -> Any:
    """A source as in an experiment file: its path alone where no column is renamed."""
    return {"path": source.path, "columns": dict(source.columns)} if source.columns else source.path


def _give_room(values: SettingsTree) -> None:
    """Set the limits of tokens to what the model has room for, and skip longer rows."""
    context = context_length(_checked(values)) or UNLIMITED
    _set(values, "data.on_bad_row", "skip")
    for stage in values["stages"]:
        if stage != "ppo":
            _set(values, f"{section_of(stage)}.max_tokens", context)
    if "ppo" in values["stages"]:
        new_tokens = min(MAX_NEW_TOKENS, context // 2)
        _set(values, "rollouts.max_new_tokens", new_tokens)
        _set(values, "rollouts.max_prompt_tokens", context - new_tokens)


def _limit_tokens(values: SettingsTree, datasets: Datasets) -> None:
    """Set the limits of tokens to what the rows need. Rows are only skipped where some do not fit the model."""
    if not datasets.skipped:
        del values["data"]["on_bad_row"]
    longest = {
        "sft": _longest(datasets.demonstrations + datasets.demonstrations_heldout),
        "classify": _longest(datasets.labels + datasets.labels_heldout),
        "reward": _longest(datasets.preferences + datasets.preferences_heldout),
        "dpo": _longest(datasets.preferences + datasets.preferences_heldout),
    }
    for stage in values["stages"]:
        if stage != "ppo":
            section = values[section_of(stage)]
            section["max_tokens"] = min(section["max_tokens"], _rounded(longest[stage]))
    if "ppo" in values["stages"]:
        prompts = [len(request.prompt_ids) for request in datasets.prompts + datasets.prompts_heldout]
        rollouts = values["rollouts"]
        rollouts["max_prompt_tokens"] = min(rollouts["max_prompt_tokens"], _rounded(max(prompts)))


def _longest(examples: list[Any]) -> int:
    return max((example.length for example in examples), default=1)


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE


def _set(values: SettingsTree, key: str, value: Any) -> None:
    """Set a setting by its dotted name."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _checked(values: SettingsTree) -> Experiment:
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(f"no experiment can be made of these arguments: {key}: {problem['msg']}") from error


def experiment_text(values: Mapping[str, Any], comment: str) -> str:
    """An experiment file that begins with a comment."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    body = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)
    return "\n".join([*lines, body])
