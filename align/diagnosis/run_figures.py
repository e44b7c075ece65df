"""What rules read of a run: its curves, the diagnostics of its reward model, its settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from align.diagnosis.verdict import Evidence
from align.runs.record_files import METRICS, read_lines
from policies.files.safe_reading import read_object


@dataclass(frozen=True)
class Curve:
    """The finite values of a metric, by rising step.

    Attributes:
        metric: The name of the metric.
        steps: The steps.
        values: The value at each step.
    """

    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def start(self) -> float:
        """Mean of the first fifth of the values, at least one."""
        return fmean(self.values[: self._fifth])

    @property
    def end(self) -> float:
        """Mean of the last fifth of the values, at least one."""
        return fmean(self.values[-self._fifth :])

    @property
    def lowest(self) -> tuple[int, float]:
        """The lowest mean of as many adjacent values as `end` is the mean of, and the last of their steps."""
        means = [fmean(self.values[stop - self._fifth : stop]) for stop in range(self._fifth, len(self) + 1)]
        position = means.index(min(means))
        return self.steps[position + self._fifth - 1], means[position]

    @property
    def change(self) -> float:
        """From start to end."""
        return self.end - self.start

    @property
    def noise(self) -> float:
        """Standard deviation of a value about a smooth curve, from the differences of neighbours; 0 for two values."""
        differences = [after - before for before, after in zip(self.values, self.values[1:], strict=False)]
        return stdev(differences) / math.sqrt(2) if len(differences) > 1 else 0.0

    @property
    def _fifth(self) -> int:
        return max(1, len(self.values) // 5)

    def from_position(self, position: int) -> "Curve":
        """The curve from its value at this position on."""
        return Curve(self.metric, self.steps[position:], self.values[position:])

    def at_start(self, threshold: float | None = None) -> Evidence:
        """The start as evidence."""
        return Evidence(self.metric, self.steps[0], self.start, threshold, "at the start")

    def at_end(self, threshold: float | None = None) -> Evidence:
        """The end as evidence."""
        return Evidence(self.metric, self.steps[-1], self.end, threshold, "at the end")


@dataclass(frozen=True)
class RunFigures:
    """What rules read of a run.

    Attributes:
        lines: The lines of its `metrics.jsonl`.
        diagnostics: The contents of `reward/diagnostics.json`; empty where there is none.
        settings: Its settings, by section.
    """

    lines: Sequence[Mapping[str, Any]]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def curve(self, metric: str, stage: str = "ppo") -> Curve:
        """A metric of a stage, over the steps at which it is a finite number."""
        steps = []
        values = []
        for line in self.lines:
            value = line.get(metric)
            if line["stage"] == stage and isinstance(value, int | float) and math.isfinite(value):
                steps.append(line["step"])
                values.append(value)
        return Curve(metric, tuple(steps), tuple(values))

    def curves(self, prefix: str) -> list[Curve]:
        """The metrics of PPO whose names begin so."""
        names: dict[str, None] = {}
        for line in self.lines:
            names |= dict.fromkeys(name for name in line if name.startswith(prefix))
        return [self.curve(name) for name in names]

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None where it is not known."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def read_figures(run: Path) -> RunFigures:
    """Read what rules read of a run, at whatever stage it is.

    Args:
        run: The run's folder.

    Raises:
        UserError: One of its files cannot be read.
    """
    config = run / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return RunFigures(read_lines(run / METRICS), _diagnostics(run, settings), settings)


def _diagnostics(run: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The diagnostics of the run's reward model, or of the finished one that it uses."""
    other = settings.get("reward", {}).get("model")
    folders = [run / "reward", *([Path(other)] if isinstance(other, str) else [])]
    for folder in folders:
        if (folder / "diagnostics.json").is_file():
            return read_object(folder / "diagnostics.json")
    return {}
