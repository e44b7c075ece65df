"""Where a tracker sends what it logs, besides the files of the run."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from align.runs.histogram import MetricValue

SAMPLE_TABLE = "samples"
"""The table of responses of training steps."""
PROBE_TABLE = "probes"
"""The table of responses to the same held-out prompts at each evaluation."""


@dataclass(frozen=True)
class RunProduct:
    """Something that a run has made and a sink may keep: an adapter, a reward model, an evaluation.

    Attributes:
        name: Its name, the same in every run of this name.
        kind: What it is: `adapter`, `reward-model` or `evaluation`.
        files: Its files, by their names in it.
        facts: What is worth knowing about it, JSON values by name.
        sources: The products that it was made from.
    """

    name: str
    kind: str
    files: Mapping[str, Path]
    facts: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence["RunProduct"] = ()

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the list of its files with the SHA-256 of each, as `sha256sum` prints it."""
        names = sorted(self.files)
        with ThreadPoolExecutor() as threads:
            digests = list(threads.map(_sha256, [self.files[name] for name in names]))
        lines = [f"{digest}  {name}\n" for name, digest in zip(names, digests, strict=True)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files.values())

    @property
    def version(self) -> str:
        """What tells this version from others of the name."""
        return self.sha256[:12]

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts, the SHA-256, and the SHA-256 of what it was made from by name."""
        sources = {source.name: source.sha256 for source in self.sources}
        metadata: dict[str, Any] = strict_json({**self.facts, "sha256": self.sha256, "started_from": sources})
        return metadata


class Sink:
    """Takes what a tracker logs. Each kind of sink overrides the methods of what it can show."""

    def follow(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over what `metrics.jsonl` holds, when the run is opened and whenever lines of it have gone.

        Args:
            rows: Its lines, each with `stage`, `step` and metrics; None stands for one that is not finite.
        """

    def log(self, stage: str, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Take the metrics of a step."""

    def show(self, table: str, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take rows of a step for `SAMPLE_TABLE` or `PROBE_TABLE`, with the same keys in every step of a run."""

    def show_errors(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]], plot: Path | None) -> None:
        """Take what a reward model gets most wrong, and the plot of its reliability; both may be missing."""

    def keep(self, product: RunProduct) -> None:
        """Keep a product."""

    def alert(self, title: str, text: str) -> None:
        """Notify the user."""

    def close(self, failed: bool) -> None:
        """End, once everything is on disk or sent. A second call does nothing."""


def strict_json(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict_json(item) for key, item in value.items()}
    return [strict_json(item) for item in value] if isinstance(value, list | tuple) else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def figures_of(row: Mapping[str, Any]) -> dict[str, MetricValue]:
    """The metrics of a line of `metrics.jsonl`, where null stands for one that is not finite."""
    return {name: _finite_or_nan(value) for name, value in row.items() if name not in ("stage", "step")}


def _finite_or_nan(value: MetricValue | None) -> MetricValue:
    return float("nan") if value is None else value
