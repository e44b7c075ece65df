"""The record of a stage, and the registered stages: one file each in `align/config/stages/`."""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from align.config import stages as records


@dataclass(frozen=True)
class Stage:
    """Everything that align needs to know about a stage. A file of `align/config/stages/` defines one as `STAGE`.

    The records are read before anything heavy is imported, so they name functions by strings, `module:function`.

    Attributes:
        name: The stage's name in `stages:`, its command, and its `stage` in `metrics.jsonl`.
        order: Stages run in this order.
        summary: One sentence, the help of its command.
        folder: The folder of its product in the run's folder; the stage is done once it exists.
        scratch: Other files and folders that it writes there, removed when it starts again.
        axis: The metric that W&B plots its metrics over; it must only ever increase.
        metric_groups: First parts of the names of its metrics.
        sources: The sources of `data` that it may train on, each read with its held-out source.
        runner: The function that runs it, from a `StageContext` to None.
        section: The section of the settings with its `tokens_per_microbatch`, if it trains anything.
        product: What its product is as an artifact in W&B, such as `adapter`; None: W&B does not get it.
        evaluation: The function from the `RunFolder` to its part of `evaluation.json`, if it has one.
        default: Whether it runs in an experiment that does not set `stages`.
        standalone: Whether no later stage starts from its product, so that it can be run again without them.
    """

    name: str
    order: int
    summary: str
    folder: str
    scratch: tuple[str, ...]
    axis: str
    metric_groups: tuple[str, ...]
    sources: tuple[str, ...]
    runner: str
    section: str | None = None
    product: str | None = None
    evaluation: str | None = None
    default: bool = False
    standalone: bool = False

    def load_runner(self) -> Callable[[Any], None]:
        """Import the function that runs the stage."""
        runner: Callable[[Any], None] = pkgutil.resolve_name(self.runner)
        return runner

    def load_evaluation(self) -> Callable[[Any], dict[str, Any]] | None:
        """Import the function that gives the stage's part of `evaluation.json`."""
        return pkgutil.resolve_name(self.evaluation) if self.evaluation else None


@cache
def all_stages() -> tuple[Stage, ...]:
    """All stages, in the order in which they run."""
    modules = [import_module(f"{records.__name__}.{info.name}") for info in pkgutil.iter_modules(records.__path__)]
    return tuple(sorted((module.STAGE for module in modules), key=lambda stage: stage.order))


def stage_names() -> list[str]:
    """The names of all stages, in the order in which they run."""
    return [stage.name for stage in all_stages()]


def find_stage(name: str) -> Stage:
    """The stage of this name. Raises KeyError where there is none."""
    for stage in all_stages():
        if stage.name == name:
            return stage
    raise KeyError(name)


def section_of(stage: str) -> str:
    """The section of the settings with the `tokens_per_microbatch` of a stage that trains something."""
    section = find_stage(stage).section
    assert section is not None, f"stage {stage} trains nothing"
    return section


def stages_from(name: str) -> list[Stage]:
    """This stage, and those after it unless none of them starts from its product."""
    first = find_stage(name)
    if first.standalone:
        return [first]
    return [stage for stage in all_stages() if stage.order >= first.order]


def stages_table() -> str:
    """A Markdown table of the stages, for docs/run-folder.md."""
    lines = [
        "| stage | what it does | writes | W&B plots it over | metrics |",
        "|---|---|---|---|---|",
    ]
    for stage in all_stages():
        groups = ", ".join(f"`{group}/…`" for group in stage.metric_groups)
        lines.append(f"| `{stage.name}` | {stage.summary} | `{stage.folder}/` | `{stage.axis}` | {groups} |")
    return "\n".join(lines)
