"""The peak memory of the processes of a stage, measured, and beside the plan."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from align.resources.actors import RANK, WORKER
from align.resources.tensor_uses import TensorUse
from policies.memory_meter import MemoryMeter

THIS_PROCESS = "controller"
"""The kind of this process, beside the kinds of actors."""


class PeakMemory:
    """Collects the peak memory of the processes of a stage. It measures that of this process, the controller."""

    def __init__(self) -> None:
        """Start to measure."""
        self._meter = MemoryMeter()
        self._actors: dict[str, int] = {}

    def note(self, kind: str, peak: int | None) -> None:
        """Note the peak of an actor in bytes, unless one of its kind has a higher one; None: it is not known."""
        if peak is not None:
            self._actors[kind] = max(peak, self._actors.get(kind, 0))

    def by_kind(self) -> dict[str, int]:
        """The highest peak, in bytes, of each kind of process of which it is known."""
        own = self._meter.peak()
        return self._actors if own is None else {THIS_PROCESS: own, **self._actors}


def beside_plan(uses: Sequence[TensorUse], peaks: Mapping[str, Mapping[str, int]]) -> list[tuple[str, str, float, int]]:
    """Set what processes have taken beside what was planned.

    Args:
        uses: The plan.
        peaks: For each stage, the peak of each kind of process, see `PeakMemory.by_kind`.

    Returns:
        Stage, process, planned bytes and bytes at the peak, of each process in both.
    """
    rows = []
    for (stage, process), own in groupby(uses, lambda use: use.owner):
        planned = sum(use.bytes for use in own)
        measured = peaks.get(stage, {})
        kind = _kind_of(process)
        peak = measured.get(kind, measured.get(THIS_PROCESS) if kind == RANK else None)
        if peak is not None:
            rows.append((stage, process, planned, peak))
    return rows


def _kind_of(process: str) -> str:
    """The kind of a process of the plan."""
    if process == "evaluation":
        return THIS_PROCESS
    return WORKER if "worker" in process else RANK
