"""The products of a run as sinks keep them: files, facts, and what each was made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.config.stage import Stage, all_stages
from align.runs.folder import RunFolder, read_facts
from align.runs.products import ready_made
from align.runs.sink import RunProduct

TEXT_FILES = (".jsonl",)
"""Ends of the names of files with prompts and responses."""


def stage_products(experiment: Experiment, run: RunFolder) -> list[RunProduct]:
    """The products of the stages that are done, in order, each with those that it was made from.

    Args:
        experiment: The settings.
        run: The run.
    """
    products: list[RunProduct] = []
    sources: list[RunProduct] = []
    for stage in all_stages():
        if stage.product and run.done(stage.name):
            product = _stage_product(experiment, run, stage, sources)
            products.append(product)
            if not stage.standalone:
                sources.append(product)
    return products


def evaluation_product(experiment: Experiment, run: RunFolder) -> RunProduct:
    """The evaluation of a run that has one, made from the products of all its stages."""
    return RunProduct(
        name=f"{experiment.name}-evaluation",
        kind="evaluation",
        files={run.evaluation.name: run.evaluation},
        facts=_model_facts(experiment) | run.read_evaluation(),
        sources=stage_products(experiment, run),
    )


def _stage_product(experiment: Experiment, run: RunFolder, stage: Stage, earlier: Sequence[RunProduct]) -> RunProduct:
    """The product of a stage that is done. It starts from those of earlier stages, unless it was adopted."""
    assert stage.product is not None
    folder = run.product(stage.name)
    facts = _model_facts(experiment) | {"stage": stage.name} | _figures(read_facts(folder))
    adopted = ready_made(experiment, stage.name)
    if adopted:
        facts["ready_made"] = adopted
    if report := stage.load_evaluation():
        facts["evaluation"] = report(run)
    return RunProduct(
        name=f"{experiment.name}-{stage.folder}",
        kind=stage.product,
        files=_files(folder, texts=experiment.tracking.texts),
        facts=facts,
        sources=() if adopted else tuple(earlier),
    )


def _model_facts(experiment: Experiment) -> dict[str, Any]:
    """The base model, and the settings of the method that are in use."""
    policy = experiment.policy
    read = {name: getattr(policy, name) for name in policy.spec.reads}
    return {"base_model": experiment.model.path, "method": policy.method, **read}


def _figures(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a stage, among them its seconds."""
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}


def _files(folder: Path, texts: bool) -> dict[str, Path]:
    """The files of a folder by their relative names; those with texts only where they may be sent."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and (texts or path.suffix not in TEXT_FILES):
            files[str(path.relative_to(folder))] = path
    return files
