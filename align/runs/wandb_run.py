"""A run's metrics in Weights & Biases, each figure once, however often the run is resumed."""

import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from align.config.schema import TrackingSettings
from align.config.stage import all_stages, find_stage, stage_names
from align.runs.logged_figures import LoggedFigures
from align.runs.sink import Sink, figures_of
from policies.errors import UserError, first_line

INIT_SECONDS = 20.0
"""How long W&B's server may take to answer at the start of a run, unless WANDB_INIT_TIMEOUT says otherwise."""

FINISH_SECONDS = 30.0
"""How long the last metrics may take to be sent at its end."""

TABLE = "samples"
"""The name of the table of samples."""
MAX_GROWTHS = 100
"""How often W&B lets a table grow in a run."""

log = logging.getLogger(__name__)


class WandbRun(Sink):
    """A W&B run that takes each figure once.

    Attributes:
        run: The run in the W&B library; None once it is closed or lost.
        logged: The figures that it has.
        folder: The folder of align's run.
        shown: How often its table of samples has grown.
    """

    def __init__(self, run: Any, logged: LoggedFigures, folder: Path, shown: int = 0) -> None:
        self.run: Any | None = run
        self.logged = logged
        self.folder = folder
        self.shown = shown
        self._table: Any = None

    def define_axes(self) -> None:
        """Have W&B plot the metrics of each stage over its own steps."""
        for stage in all_stages():
            if self.run is None:
                return
            with self._surviving():
                self.run.define_metric(stage.axis, hidden=True)
                for group in stage.metric_groups:
                    self.run.define_metric(f"{group}/*", step_metric=stage.axis)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log those metrics of a step that have not been logged yet."""
        new = {name: value for name, value in metrics.items() if not self.logged.has(stage, step, name)}
        if self.run is None or not new:
            return
        with self._surviving():
            self.run.log({**new, find_stage(stage).axis: step})
        self.logged.add(stage, step, new)

    def show(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add samples of a step to the table `samples`, unless they are in it or W&B takes no more.

        Args:
            stage: The stage's name.
            step: The step, counted from 1.
            rows: The samples, with the same keys in every step of a run.
        """
        if self.run is None or not rows or self.shown >= MAX_GROWTHS or self.logged.has(stage, step, TABLE):
            return
        import wandb

        with self._surviving(), _wandb_environment(self.folder):
            if self._table is None:
                self._table = wandb.Table(columns=["step", *rows[0]], log_mode="INCREMENTAL")
            for row in rows:
                self._table.add_data(step, *row.values())
            self.run.log({TABLE: self._table, find_stage(stage).axis: step})
        self.shown += 1
        self.logged.add(stage, step, [TABLE])

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify the user, as their settings there say."""
        if self.run is not None:
            with self._surviving():
                self.run.alert(title=title, text=text)

    def follow(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Log those figures that W&B lacks: a kill loses what W&B has not written to disk yet."""
        for row in rows:
            if row["stage"] in stage_names():
                self.log(row["stage"], row["step"], figures_of(row))

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Continue without W&B where the block fails: losing its process must not end hours of training."""
        try:
            yield
        except Exception as error:
            log.warning("W&B is lost; the run continues without it: %s", error)
            self.run = None
            stop_wandb()  # or W&B would try at the end of this process, and fail with a traceback

    def close(self, failed: bool) -> None:
        """End the run, once everything logged is on disk or sent. A second call does nothing."""
        run = self.run
        self.run = None
        if run is None:
            return
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            log.warning("W&B has not taken all metrics in %.0f s; `wandb sync %s` sends them", FINISH_SECONDS, run.dir)
        except Exception as error:
            log.warning("W&B did not end cleanly: %s", error)
        stop_wandb()


def start_wandb(
    run: Path, settings: TrackingSettings, name: str, config: dict[str, Any], job_type: str | None = None
) -> WandbRun | None:
    """Start the W&B run of a run, or continue it.

    Args:
        run: The run's folder.
        settings: Whether and where to log to W&B.
        name: The name of the run in W&B.
        config: The settings that W&B keeps with the run.
        job_type: By what W&B can tell runs of a group apart.

    Returns:
        The W&B run; None where it is disabled. With `auto`, it is offline where the server does not answer.

    Raises:
        UserError: W&B cannot start.
    """
    if settings.wandb == "disabled":
        return None
    with _wandb_environment(run):
        import wandb

        try:
            mode = tracking_mode(settings)
            if mode == "disabled":
                return None
            wandb_run = _init_or_go_offline(run, settings, mode, {"name": name, "config": config, "job_type": job_type})
        except (wandb.Error, ValueError) as error:
            stop_wandb()
            raise UserError(
                f"W&B cannot start: {error}. Set tracking.wandb to offline (kept in {run / 'wandb'}, `wandb sync` "
                "sends it later) or disabled; for online, log in with `wandb login` and check that the server can be "
                "reached"
            ) from error
        history = _recorded_history(run)
        logged = _logged_figures(history, dict(wandb_run.summary))
    started = WandbRun(wandb_run, logged, run, shown=sum(TABLE in item for item in history))
    started.define_axes()
    return started


def forget_wandb_run(run: Path) -> None:
    """Make the next W&B run of this folder a new one: W&B cannot take back what a removed stage has logged."""
    _id_file(run).unlink(missing_ok=True)


def _init_or_go_offline(run: Path, settings: TrackingSettings, mode: Any, arguments: dict[str, Any]) -> Any:
    """Start the W&B run, offline if `auto` finds a login but no server."""
    import wandb

    try:
        return _init(run, settings, mode, arguments)
    except wandb.errors.AuthenticationError:
        raise
    except wandb.Error as error:
        if settings.wandb != "auto" or mode != "online":
            raise
        log.warning(
            "W&B's server cannot be reached, so the run is tracked offline; `wandb sync` sends what is in %s: %s",
            run / "wandb",
            first_line(error),
        )
        stop_wandb()
        return _init(run, settings, "offline", arguments)


def _init(run: Path, settings: TrackingSettings, mode: Any, arguments: dict[str, Any]) -> Any:
    import wandb

    limits = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        limits["init_timeout"] = INIT_SECONDS
    return wandb.init(
        dir=run,
        project=settings.project,
        entity=settings.entity,
        group=settings.group,
        tags=settings.tags,
        notes=settings.notes,
        id=_run_id(run),
        resume="allow",
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", **limits),
        **arguments,
    )


def tracking_mode(settings: TrackingSettings) -> Any:
    """`online`, `offline` or another mode of W&B: what the settings, WANDB_MODE or the user's login say."""
    if settings.wandb != "auto":
        return settings.wandb
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import wandb

    return "online" if wandb.login(prompt=False, verify=False) else "offline"


def _id_file(run: Path) -> Path:
    return run / "wandb" / "id"


def _run_id(run: Path) -> str:
    """The id of the W&B run, created once per folder."""
    path = _id_file(run)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(".id.writing")
        temporary.write_text(secrets.token_hex(4))
        temporary.replace(path)
    return path.read_text()


def _recorded_history(run: Path) -> list[dict[str, Any]]:
    """What the W&B run has logged into its files, each item with the name of the table that it adds to, if it does."""
    history = []
    for file in sorted((run / "wandb").glob(f"*run-*-{_run_id(run)}/*.wandb")):
        for item in _history(file):
            if any(name.startswith(f"{TABLE}.") for name in item):
                item[TABLE] = None
            history.append(item)
    return history


def _logged_figures(history: Iterable[Mapping[str, Any]], summary: Mapping[str, Any]) -> LoggedFigures:
    """The figures that the W&B run has: those in its files, and those that only the server has.

    Args:
        history: What its files hold.
        summary: The last value of each metric; online, the server's.
    """
    logged = LoggedFigures()
    for item in history:
        _add(logged, item)
    for stage in all_stages():
        # W&B writes its file every 15 s, and may have sent more when it was killed.
        if summary.get(stage.axis, -1) > logged.last_step(stage.name):
            logged.add(stage.name, summary[stage.axis], summary.keys())
    return logged


def _add(logged: LoggedFigures, item: Mapping[str, Any]) -> None:
    """Add the metrics of one `log`."""
    for stage in all_stages():
        if stage.axis in item:
            logged.add(stage.name, item[stage.axis], item)


def _history(file: Path) -> Iterator[dict[str, Any]]:
    """The metrics of each step in one of W&B's files, which may end anywhere."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    if read.returncode:
        raise UserError(f"{file} cannot be read: {read.stderr.strip()}. Remove its folder to continue without it")
    for line in read.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            yield record["history"]["item"]


@contextmanager
def _wandb_environment(run: Path) -> Iterator[None]:
    """Make W&B quiet, and have its process write to the run's folder instead of the user's home.

    That process takes all of this from the environment in which it starts.
    """
    wandb = (run / "wandb").absolute()
    folders = {"WANDB_CACHE_DIR": str(wandb / "cache"), "WANDB_DATA_DIR": str(wandb / "data")}
    before = {name: os.environ.get(name) for name in ("WANDB_SILENT", *folders)}
    os.environ["WANDB_SILENT"] = "true"
    for name, folder in folders.items():
        os.environ.setdefault(name, folder)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def stop_wandb() -> None:
    """End W&B's process, which would otherwise live as long as this one."""
    import wandb

    with suppress(Exception):
        wandb.teardown()
