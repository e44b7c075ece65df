"""The record of a run: `metrics.jsonl`, `samples.jsonl`, `events.jsonl`, and what W&B and TensorBoard show of them."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from align.config.schema import TrackingSettings
from align.config.stage import find_stage, stage_names
from align.runs.histogram import MetricValue
from align.runs.logged_figures import LoggedFigures
from align.runs.record_files import EVENTS, METRICS, SAMPLES, read_lines
from align.runs.sink import PROBE_TABLE, SAMPLE_TABLE, RunProduct, Sink, strict_json
from align.runs.tensorboard import TensorBoard
from align.runs.wandb_run import forget_wandb_run, start_wandb
from align.runtime.atomic_files import sync


class Tracker:
    """Writes each step to the run's files at once, and sends it to sinks such as W&B.

    Each figure stands once: stage, step and name identify it, and one that is logged again replaces the earlier one.
    """

    def __init__(self, run: Path, sinks: Sequence[Sink] = ()) -> None:
        """Create a tracker; `open_tracker` also opens the sinks.

        Args:
            run: The run's folder.
            sinks: Where metrics and samples go besides the run's files.
        """
        self.run = run
        self.sinks = sinks
        self._read_files()
        self._follow()

    def log(self, stage: str, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Write a line to `metrics.jsonl`, and send the metrics to the sinks.

        Args:
            stage: The stage's name.
            step: The step, counted from 1.
            metrics: The metrics by name; a number that is not finite becomes null in the file.
        """
        path = self.run / METRICS
        if any(self._logged.has(stage, step, name) for name in metrics):
            _rewrite(path, _without_figures(read_lines(path), stage, step, metrics.keys()))
            self._follow()
        _append(path, [{"stage": stage, "step": step, **metrics}])
        self._logged.add(stage, step, metrics)
        for sink in self.sinks:
            sink.log(stage, step, metrics)

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]], show: bool = False) -> None:
        """Write the samples of a step to `samples.jsonl`.

        Args:
            stage: The stage's name.
            step: The step, counted from 1.
            rows: The samples, each a mapping of JSON values.
            show: Whether the sinks show them too.
        """
        self._write_rows(SAMPLE_TABLE, stage, step, rows, show)

    def probes(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]], show: bool = False) -> None:
        """As `samples`, for responses to the same prompts at each evaluation; each row has the key `reference`."""
        self._write_rows(PROBE_TABLE, stage, step, rows, show)

    def _write_rows(self, table: str, stage: str, step: int, rows: Sequence[Mapping[str, Any]], show: bool) -> None:
        """Write rows of a table to `samples.jsonl`, in place of those of the step that are there."""
        path = self.run / SAMPLES
        if self._sampled.has(stage, step, table):
            place = (table, stage, step)
            _rewrite(path, [row for row in read_lines(path) if (_table_of(row), row["stage"], row["step"]) != place])
        _append(path, [{"stage": stage, "step": step, **row} for row in rows])
        self._sampled.add(stage, step, [table])
        if show:
            for sink in self.sinks:
                sink.show(table, stage, step, rows)

    def show_errors(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]], plot: Path | None) -> None:
        """Have the sinks show what a reward model gets most wrong.

        Args:
            stage: The stage's name.
            step: The last step of the stage.
            rows: The worst errors with their texts; none where the sinks must not have texts.
            plot: The plot of the model's reliability, if there is one.
        """
        for sink in self.sinks:
            sink.show_errors(stage, step, rows, plot)

    def keep(self, product: RunProduct) -> None:
        """Have the sinks keep a product. They may have it already."""
        for sink in self.sinks:
            sink.keep(product)

    def event(self, stage: str, kind: str, text: str) -> None:
        """Write an event to `events.jsonl`, where it stays even if steps run again; the first of a kind is an alert.

        Args:
            stage: The stage's name.
            kind: What kind of event it is.
            text: What has happened, in a sentence.
        """
        is_first = all(event["event"] != kind for event in read_lines(self.run / EVENTS))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        event = {"stage": stage, "step": self._logged.last_step(stage), "event": kind, "time": now, "text": text}
        _append(self.run / EVENTS, [event])
        if is_first:
            for sink in self.sinks:
                sink.alert(kind, text)

    def drop_after(self, stage: str, step: int) -> None:
        """Drop the lines of steps that will run again, see `truncate_after`."""
        truncate_after(self.run, stage, step)
        self._read_files()
        self._follow()

    def close(self, failed: bool = False) -> None:
        """Close the sinks, once everything logged is on disk or sent. A second call does nothing."""
        for sink in self.sinks:
            sink.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _follow(self) -> None:
        """Have the sinks take over what `metrics.jsonl` holds now."""
        for sink in self.sinks:
            sink.follow(read_lines(self.run / METRICS))

    def _read_files(self) -> None:
        """Find out which figures and samples the files hold, and end a last line that was only partly written."""
        for name in (METRICS, SAMPLES, EVENTS):
            path = self.run / name
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                _rewrite(path, read_lines(path))
        self._logged = LoggedFigures()
        for row in read_lines(self.run / METRICS):
            self._logged.add(row["stage"], row["step"], row)
        self._sampled = LoggedFigures()
        for row in read_lines(self.run / SAMPLES):
            self._sampled.add(row["stage"], row["step"], [_table_of(row)])


def _table_of(row: Mapping[str, Any]) -> str:
    """The table of a line of `samples.jsonl`."""
    return PROBE_TABLE if "reference" in row else SAMPLE_TABLE


def open_tracker(
    run: Path, settings: TrackingSettings, name: str, config: dict[str, Any], job_type: str | None = None
) -> Tracker:
    """Open the tracker of a run. A resumed run continues the same W&B run.

    Args:
        run: The run's folder, which is created if it does not exist.
        settings: Where to log besides the run's files.
        name: The name of the run in W&B.
        config: The settings that W&B keeps with the run.
        job_type: By what W&B can tell runs of a group apart.

    Returns:
        The tracker, to be closed, or used as a context manager.

    Raises:
        UserError: W&B cannot start.
    """
    run.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = []
    if wandb_run := start_wandb(run, settings, name, config, job_type):
        sinks.append(wandb_run)
    if settings.tensorboard:
        sinks.append(TensorBoard(run))
    return Tracker(run, sinks)


def truncate_after(run: Path, stage: str, step: int) -> None:
    """Drop all lines of both files after a step, so that steps that a resumed run repeats are logged only once.

    Args:
        run: The run's folder.
        stage: The stage that is resumed; the lines of later stages are dropped too, if they may start from it.
        step: The last step whose lines are kept; -1: none of the stage.
    """
    for name in (METRICS, SAMPLES):
        path = run / name
        if path.exists():
            _rewrite(path, [row for row in read_lines(path) if _is_up_to(row, stage, step)])


def drop_stages(run: Path, stages: Collection[str]) -> None:
    """Drop all lines of stages whose products are removed. What they have logged to W&B stays in an earlier W&B run.

    Args:
        run: The run's folder.
        stages: The names of the stages.
    """
    for name in (METRICS, SAMPLES, EVENTS):
        rows = read_lines(run / name)
        kept = [row for row in rows if row["stage"] not in stages]
        if len(kept) < len(rows):
            forget_wandb_run(run)
            _rewrite(run / name, kept)


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one with these rows, completely or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    _append(temporary, rows)
    sync(temporary)
    temporary.replace(path)


def _without_figures(
    rows: Iterable[Mapping[str, Any]], stage: str, step: int, names: Collection[str]
) -> Iterator[Mapping[str, Any]]:
    """The rows without these metrics of a step; a row that has no others is dropped."""
    for row in rows:
        kept = row
        if (row["stage"], row["step"]) == (stage, step):
            kept = {name: value for name, value in row.items() if name not in names}
        if kept.keys() > {"stage", "step"}:
            yield kept


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(strict_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    # backslashreplace: a lone surrogate, which a tokenizer can produce, becomes its JSON escape.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(lines))
        file.flush()


def _is_up_to(row: Mapping[str, Any], stage: str, step: int) -> bool:
    """Whether a row is not after a step of a stage, nor of a stage that starts from its product."""
    if row["stage"] == stage:
        return bool(row["step"] <= step)
    return find_stage(stage).standalone or _position(row["stage"]) < _position(stage)


def _position(stage: str) -> int:
    """The position of a stage in the order of a run; unknown stages come last."""
    names = stage_names()
    return names.index(stage) if stage in names else len(names)
