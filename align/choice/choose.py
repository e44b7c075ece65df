"""Chooses a technique: looks at the data, the model and the machine, finds the rule, and makes its experiment."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.choice.facts import ROW_KINDS, Facts, TaskName
from align.choice.recipes import FULL, RLHF
from align.choice.rules import ChoiceRule, choose_rule
from align.choice.starting import SettingsTree, experiment_text, recipe_fits, starting_experiment
from align.choice.survey import Machine, Survey, find_machine, survey_data
from align.config.schema import Experiment
from align.resources.memory import measure
from align.resources.plan import Plan
from align.runtime.wording import counted
from align.stages.launch import plan_run
from policies.schema import ModelSettings, PolicySettings

COMMENT_WIDTH = 100


@dataclass(frozen=True)
class Choice:
    """A technique, and an experiment to start with.

    Attributes:
        rule: The rule that applies.
        facts: What it was chosen by.
        machine: The memory of each process.
        values: The settings of the experiment that differ from the defaults.
        fits: Whether the experiment fits this memory, by the plan.
        plan: The plan of the experiment.
    """

    rule: ChoiceRule
    facts: Facts
    machine: Machine
    values: SettingsTree
    fits: bool
    plan: Plan

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The name and the text of each line for people, before those of the plan."""
        lines = [
            ("technique", self.rule.technique),
            ("rule", f"task {self.rule.task}, {self.rule.when}"),
            ("because", self.rule.why),
            ("source", self.rule.source),
            ("data", self.data),
            ("machine", str(self.machine)),
        ]
        if self.rule.compares:
            lines.append(("experiment", f"{self.rule.technique} trains nothing: an alternative to compare it with"))
        if not self.fits:
            lines.append(("too large", "no method of this experiment fits the machine; see the lines on memory"))
        return lines

    @property
    def data(self) -> str:
        """What the data holds."""
        parts = [f"{count:,} {ROW_KINDS[kind]}" for kind, count in self.facts.rows.items()]
        if self.facts.text_tokens:
            parts.append(f"about {counted(self.facts.text_tokens, 'token')} of text")
        return ", ".join(parts)

    @property
    def text(self) -> str:
        """The experiment file."""
        sentences = [f"{name}: {text}" for name, text in self.lines]
        wrapped = [textwrap.fill(sentence, COMMENT_WIDTH, subsequent_indent="  ") for sentence in sentences]
        return experiment_text(self.values, "\n".join(["A starting experiment by `align choose`.", *wrapped]))

    @property
    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "technique": self.rule.technique,
            "rule": self.rule.when,
            "why": self.rule.why,
            "source": self.rule.source,
            "experiment": "alternative" if self.rule.compares else "technique",
            "fits": self.fits,
            "machine": asdict(self.machine),
            "facts": asdict(self.facts),
            "plan": [list(line) for line in self.plan.lines],
        }


def choose(
    task: TaskName, files: Sequence[Path], model: str, name: str, columns: dict[str, str], gpu_gigabytes: float | None
) -> Choice:
    """Choose a technique.

    Args:
        task: What the model is to do.
        files: The data: files, or folders of files.
        model: Folder or hub name of the base model.
        name: The name of the experiment.
        columns: align's name of a column: its name in the data.
        gpu_gigabytes: Memory of the GPU of each process in GB; None: that of this machine's, or else its own memory.

    Raises:
        UserError: The data cannot be read, does not suit the task, or no experiment that can be planned comes of it.
    """
    survey = survey_data(files, columns)
    machine = find_machine(gpu_gigabytes)
    facts = gather_facts(task, survey, model, machine)
    rule = choose_rule(facts)
    values, is_fitting = starting_experiment(rule.recipe, survey, name, model, machine)
    plan = plan_run(Experiment.model_validate(values), machine.gpu_bytes)
    return Choice(rule, facts, machine, values=values, fits=is_fitting, plan=plan)


def gather_facts(task: TaskName, survey: Survey, model: str, machine: Machine) -> Facts:
    """What the rules ask about, of a survey and a model."""
    return Facts(
        task,
        parameters=measure(ModelSettings(path=model), PolicySettings()).base,
        rows=dict(survey.rows),
        classes=survey.classes,
        text_tokens=survey.text_tokens(model),
        full_fits=recipe_fits(FULL, model, machine),
        rlhf_fits=recipe_fits(RLHF, model, machine),
    )
