"""Where a tracker sends what it logs, besides the files of the run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Sink:
    """Takes what a tracker logs. Each kind of sink overrides the methods of what it can show."""

    def follow(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what `metrics.jsonl` holds, when the run is opened and whenever lines of it have gone.

        Args:
            rows: Its lines, each with `stage`, `step` and metrics; None stands for one that is not finite.
        """

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""

    def show(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take samples of a step, with the same keys in every step of a run."""

    def alert(self, title: str, text: str) -> None:
        """Notify the user."""

    def close(self, failed: bool) -> None:
        """End, once everything is on disk or sent. A second call does nothing."""


def figures_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line of `metrics.jsonl`, where null stands for one that is not finite."""
    return {name: _number(value) for name, value in row.items() if name not in ("stage", "step")}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
