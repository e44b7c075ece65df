"""A run's metrics in TensorBoard's event files."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from time import time
from typing import Any

import numpy as np

from align.runs.histogram import MetricValue, bin_edges, bin_middles
from align.runs.sink import Sink, figures_of

EVENT_FILES = "tensorboard"
"""The folder of the event files in the run's folder."""


class TensorBoard(Sink):
    """Writes metrics to event files, over the step of their stage.

    What is written to an event file cannot be taken back. When a run is resumed, and where lines of `metrics.jsonl`
    have gone, the files are written again from it: for every reader, each figure stands once.
    """

    def __init__(self, run: Path) -> None:
        """Prepare to write to a folder in the run's folder; `follow` creates the files."""
        self.folder = run / EVENT_FILES
        self._writer: Any = None

    def follow(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the event files by one with these rows."""
        from tensorboardX.event_file_writer import EventsWriter  # slow to import

        self.close(failed=False)
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.glob("events.out.tfevents.*"):
            file.unlink()
        self._writer = EventsWriter(str(self.folder / "events"))
        for row in rows:
            self._write(row["step"], figures_of(row))
        self._writer.flush()

    def log(self, stage: str, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Write the metrics of a step at once, so that a kill loses none."""
        self._write(step, metrics)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _write(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [_summary_value(name, value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=time(), step=step, summary=Summary(value=values)))


def _summary_value(name: str, value: MetricValue) -> Any:
    """A metric as TensorBoard stores it."""
    from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

    if not isinstance(value, dict):
        return Summary.Value(tag=name, simple_value=float(value))
    edges = bin_edges(value)
    counts = value["counts"]
    middles = np.array(bin_middles(value))
    histogram = HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=float(middles @ counts),
        sum_squares=float(middles**2 @ counts),
        bucket_limit=edges[1:],
        bucket=counts,
    )
    return Summary.Value(tag=name, histo=histogram)
