"""The settings of runs as rows: those that differ from the defaults, or between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.config.schema import Experiment
from align.report.run_record import RunRecord
from align.runs.fingerprint import flatten

UNSET = "–"
NAMES = ("name", "runs", "schema_version")
"""Settings in which any two runs differ."""


def changed_settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """Name, value and default of each setting that is not the default."""
    if run.experiment is None:
        return []
    chosen = _texts(run.experiment.model_dump(mode="json", exclude_defaults=True))
    defaults = _default_settings(run.experiment)
    rows = []
    for name, value in chosen.items():
        if name not in NAMES and defaults.get(name, UNSET) != value:
            rows.append((name, value, defaults.get(name, UNSET)))
    return rows


def differing_settings(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Name, and value in each run, of the settings in which runs differ."""
    settings = [_settings(run) for run in runs]
    names: dict[str, None] = {}
    for chosen in settings:
        names |= dict.fromkeys(chosen)
    rows = []
    for name in names:
        values = [chosen.get(name, UNSET) for chosen in settings]
        if name not in NAMES and len(set(values)) > 1:
            rows.append((name, values))
    return rows


def _settings(run: RunRecord) -> dict[str, str]:
    """Every setting of a run as text."""
    return _texts(run.experiment.model_dump(mode="json")) if run.experiment else {}


def _default_settings(experiment: Experiment) -> dict[str, str]:
    """The settings of an experiment that says only what it must."""
    required = {"name": experiment.name, "model": {"path": experiment.model.path}}
    defaults = _texts(Experiment.model_validate(required).model_dump(mode="json"))
    return {name: text for name, text in defaults.items() if name != "model.path"}


def _texts(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(value) for name, value in flatten(settings)}


def _text(value: Any) -> str:
    """A value as an experiment file has it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
