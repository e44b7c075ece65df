"""The record of a run's steps: `metrics.jsonl`, `samples.jsonl`, and the same metrics in Weights & Biases."""

import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from align.config.schema import TrackingSettings
from align.config.stage import all_stages, find_stage, stage_names
from policies.errors import UserError

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"

log = logging.getLogger(__name__)


class Tracker:
    """Writes each step to the run's files at once, and to W&B if there is a W&B run."""

    def __init__(self, run: Path, wandb_run: Any | None) -> None:
        """Create a tracker; `open_tracker` also starts the W&B run.

        Args:
            run: The run's folder.
            wandb_run: The W&B run, or None.
        """
        self.run = run
        self.wandb_run = wandb_run

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line to `metrics.jsonl`, and log the metrics to W&B.

        Args:
            stage: The stage's name.
            step: The step, counted from 1.
            metrics: The metrics by name; one that is not finite becomes null in the file.
        """
        _append(self.run / METRICS, [{"stage": stage, "step": step, **metrics}])
        if self.wandb_run is not None:
            try:
                self.wandb_run.log({**metrics, find_stage(stage).axis: step})
            except Exception as error:  # losing the W&B process must not end hours of training
                log.warning("W&B is lost; the run continues without it: %s", error)
                self.wandb_run = None

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append samples of a step, each a mapping of JSON values, to `samples.jsonl`."""
        _append(self.run / SAMPLES, [{"stage": stage, "step": step, **row} for row in rows])

    def close(self, failed: bool = False) -> None:
        """End the W&B run, once everything logged is on disk or sent. A second call does nothing."""
        wandb_run = self.wandb_run
        self.wandb_run = None
        if wandb_run is not None:
            try:
                wandb_run.finish(exit_code=int(failed))
            except Exception as error:
                log.warning("W&B did not end cleanly: %s", error)
            _stop_wandb()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_tracker(run: Path, settings: TrackingSettings, name: str, config: dict[str, Any]) -> Tracker:
    """Open the tracker of a run. A resumed run continues the same W&B run.

    Args:
        run: The run's folder, which is created if it does not exist.
        settings: Whether and where to log to W&B.
        name: The name of the run in W&B.
        config: The settings that W&B keeps with the run.

    Returns:
        The tracker, to be closed, or used as a context manager.

    Raises:
        UserError: W&B cannot start.
    """
    run.mkdir(parents=True, exist_ok=True)
    if settings.wandb == "disabled":
        return Tracker(run, None)
    with _wandb_environment(run):
        return Tracker(run, _start_wandb(run, settings, name, config))


def truncate_after(run: Path, stage: str, step: int) -> None:
    """Drop all lines of both files after a step, so that steps that a resumed run repeats are logged only once.

    Args:
        run: The run's folder.
        stage: The stage that is resumed; the lines of later stages are dropped too.
        step: The last step whose lines are kept.
    """
    for name in (METRICS, SAMPLES):
        path = run / name
        if path.exists():
            temporary = path.with_name(f".{name}.writing")
            temporary.unlink(missing_ok=True)
            _append(temporary, [row for row in read_lines(path) if _is_up_to(row, stage, step)])
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of the tracker.

    Args:
        path: `metrics.jsonl` or `samples.jsonl`, which may not exist.

    Returns:
        The rows, without a last line that was only partly written because the process was killed.

    Raises:
        UserError: Another line is damaged; the message names it.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"stage", "step"} <= row.keys():
                raise ValueError("expected an object with `stage` and `step`")
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: {error}. Remove the line to continue without it") from None
        else:
            rows.append(row)
    return rows


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = [json.dumps(_strict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    # backslashreplace: a lone surrogate, which a tokenizer can produce, becomes its JSON escape.
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write("".join(lines))
        file.flush()


def _strict(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value


def _is_up_to(row: Mapping[str, Any], stage: str, step: int) -> bool:
    """Whether a row is not after a step of a stage."""
    position = _position(row["stage"])
    last = _position(stage)
    return position < last or (position == last and row["step"] <= step)


def _position(stage: str) -> int:
    """The position of a stage in the order of a run; unknown stages come last."""
    names = stage_names()
    return names.index(stage) if stage in names else len(names)


def _start_wandb(run: Path, settings: TrackingSettings, name: str, config: dict[str, Any]) -> Any | None:
    import wandb

    try:
        mode = _mode(settings)
        if mode == "disabled":
            return None
        wandb_run = wandb.init(
            dir=run,
            project=settings.project,
            name=name,
            id=_run_id(run),
            resume="allow",
            mode=mode,
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, ValueError) as error:
        _stop_wandb()
        raise UserError(
            f"W&B cannot start: {error}. Set tracking.wandb to offline (kept in {run / 'wandb'}, `wandb sync` sends it "
            "later) or disabled; for online, log in with `wandb login` and check that the server can be reached"
        ) from error
    for stage in all_stages():
        wandb_run.define_metric(stage.axis, hidden=True)
        for group in stage.metric_groups:
            wandb_run.define_metric(f"{group}/*", step_metric=stage.axis)
    return wandb_run


def _mode(settings: TrackingSettings) -> Any:
    if settings.wandb != "auto":
        return settings.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _run_id(run: Path) -> str:
    """The id of the W&B run, created once per folder."""
    path = run / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(".id.writing")
        temporary.write_text(secrets.token_hex(4))
        temporary.replace(path)
    return path.read_text()


@contextmanager
def _wandb_environment(run: Path) -> Iterator[None]:
    """Make W&B quiet, and have its process write logs to the run's folder instead of the user's home.

    That process takes both from the environment in which it starts.
    """
    before = {name: os.environ.get(name) for name in ("WANDB_SILENT", "WANDB_CACHE_DIR")}
    os.environ["WANDB_SILENT"] = "true"
    os.environ.setdefault("WANDB_CACHE_DIR", str((run / "wandb" / "cache").absolute()))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _stop_wandb() -> None:
    """End W&B's process, which would otherwise live as long as this one."""
    import wandb

    with suppress(Exception):
        wandb.teardown()
