"""What the folder of a run holds, read for its page. Every part may be missing: a run may be at any stage."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.load import load_experiment
from align.config.schema import Experiment
from align.config.stage import stage_names
from align.diagnosis.diagnose import verdicts
from align.diagnosis.run_figures import read_figures
from align.diagnosis.verdict import Verdict
from align.runs.folder import RunFolder, is_locked, read_facts, read_peaks
from align.runs.histogram import Histogram
from align.runs.products import state_of
from align.runs.record_files import EVENTS, SAMPLES, read_lines
from policies.errors import UserError
from policies.files.safe_reading import read_object

EVALUATED = ("step", "score_mean", "win_rate", "kl_per_sequence", "kl_per_token")
"""The figures that every evaluation of a policy has."""
Line = dict[str, Any]
"""A line of `metrics.jsonl`, `samples.jsonl` or `events.jsonl`."""


class MetricHistory:
    """The values and the histograms of every metric by step."""

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Sort the lines of `metrics.jsonl` by stage and metric."""
        self._values: dict[tuple[str, str], dict[int, float | None]] = {}
        self._histograms: dict[tuple[str, str], dict[int, Histogram]] = {}
        for line in lines:
            for name, value in line.items():
                if name not in ("stage", "step"):
                    kind: dict[tuple[str, str], Any] = self._histograms if isinstance(value, dict) else self._values
                    kind.setdefault((line["stage"], name), {})[line["step"]] = value

    def names(self, stage: str) -> list[str]:
        """The metrics that a stage has logged and that are numbers, in the order of their first values."""
        return [name for owner, name in self._values if owner == stage]

    def values(self, stage: str, name: str) -> dict[int, float | None]:
        """The values of a metric by step, in order; None where one is not finite."""
        return dict(sorted(self._values.get((stage, name), {}).items()))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been logged."""
        return not self._values and not self._histograms

    def histograms(self, stage: str, name: str) -> dict[int, Histogram]:
        """The histograms of a metric by step, in order."""
        found = self._histograms.get((stage, name), {})
        return {step: found[step] for step in sorted(found) if sum(found[step]["counts"])}

    def last(self, stage: str, name: str) -> float | None:
        """The last value of a metric that is finite."""
        finite = [value for value in self.values(stage, name).values() if value is not None]
        return finite[-1] if finite else None

    def last_step(self, stage: str) -> int | None:
        """The last step of a stage; None where it has logged nothing."""
        steps = [max(values) for (owner, _), values in self._values.items() if owner == stage and values]
        return max(steps, default=None)


@dataclass(frozen=True)
class RunRecord:
    """What the page of a run shows.

    Attributes:
        path: The run's folder.
        name: What the page calls it: the name of the folder.
        state: `running`, `stopped` or `done`; empty where it cannot be told.
        history: Its metrics.
        samples: The lines of `samples.jsonl`.
        events: The lines of `events.jsonl`.
        evaluation: The contents of `evaluation.json`.
        is_extended: Whether PPO has gone on to more steps since that evaluation, and has not ended again.
        diagnostics: The contents of `diagnostics.json` of its reward model, its own or the one that it uses.
        experiment: Its settings; None where they cannot be read.
        fingerprint: The contents of `fingerprint.json`.
        seconds: How long each of its finished stages took.
        peaks: The peak memory in bytes of each kind of process, by stage.
        verdicts: What the diagnosis says.
    """

    path: Path
    name: str
    state: str
    history: MetricHistory
    samples: Sequence[Line]
    events: Sequence[Line]
    evaluation: Mapping[str, Any]
    is_extended: bool
    diagnostics: Mapping[str, Any]
    experiment: Experiment | None
    fingerprint: Mapping[str, Any]
    seconds: Mapping[str, float]
    peaks: Mapping[str, Mapping[str, int]]
    verdicts: Sequence[Verdict]


def read_run_record(run: Path, evaluation: Mapping[str, Any]) -> RunRecord:
    """Read a run's folder.

    Args:
        run: The folder, which may hold any part of a run.
        evaluation: The contents of its `evaluation.json`.

    Raises:
        UserError: One of its files is damaged.
    """
    folder = RunFolder(run)
    if problem := _problem_of(evaluation):
        raise UserError(f"{run}/evaluation.json {problem}: `align eval {run}` writes it again")
    experiment = _read_settings(folder)
    figures = read_figures(run)
    history = MetricHistory(figures.lines)
    return RunRecord(
        path=run,
        name=run.resolve().name,
        state=_state(folder, experiment),
        history=history,
        samples=read_lines(run / SAMPLES, ("prompt", "response")),
        events=read_lines(run / EVENTS, ("time", "event", "text")),
        evaluation=evaluation,
        is_extended=not folder.done("ppo") and _is_older(evaluation, history),
        diagnostics=figures.diagnostics,
        experiment=experiment,
        fingerprint=_read_if_there(folder.fingerprint),
        seconds=_seconds(folder),
        peaks=read_peaks(folder, stage_names()),
        verdicts=verdicts(figures),
    )


def _is_older(evaluation: Mapping[str, Any], history: MetricHistory) -> bool:
    """Whether the policy that was evaluated is not that of the last step."""
    last = history.last_step("ppo")
    return "policy" in evaluation and last is not None and evaluation["policy"]["step"] < last


def _problem_of(evaluation: Mapping[str, Any]) -> str | None:
    """What is wrong with the evaluation of a policy; None: nothing, or there is none yet."""
    if "policy" not in evaluation:
        return None
    if "reference" not in evaluation:
        return "has a policy and no reference"
    needs = {"policy": EVALUATED, "reference": ("score_mean",)}
    for section, names in needs.items():
        figures = evaluation[section]
        if not isinstance(figures, dict):
            return f"has no figures in {section}"
        for name in figures.keys() | set(names):
            if not isinstance(figures.get(name), int | float):
                return f"has no number in {section}.{name}"
    return None if isinstance(evaluation.get("prompts"), int) else "has no number of prompts"


def _read_settings(folder: RunFolder) -> Experiment | None:
    """The run's settings; None where there is no file, or one of another version of align."""
    try:
        return load_experiment(folder.config) if folder.config.is_file() else None
    except UserError:
        return None


def _state(folder: RunFolder, experiment: Experiment | None) -> str:
    if experiment is None:
        return "running" if is_locked(folder) else ""
    return state_of(experiment, folder)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _seconds(folder: RunFolder) -> dict[str, float]:
    seconds = {}
    for stage in stage_names():
        facts = read_facts(folder.product(stage))
        if "seconds" in facts:
            seconds[stage] = facts["seconds"]
    return seconds
