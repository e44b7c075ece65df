"""A run's metrics in Weights & Biases, each figure once, however often the run is resumed."""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from align.config.schema import TrackingSettings
from align.config.stage import all_stages, find_stage, stage_names
from align.runs.histogram import MetricValue, bin_edges
from align.runs.sink import RunProduct, Sink, figures_of
from align.runs.wandb_artifacts import artifact_of
from align.runs.wandb_record import Recorded, read_recorded
from policies.errors import UserError, first_line

INIT_SECONDS = 20.0
"""How long W&B's server may take to answer at the start of a run, unless WANDB_INIT_TIMEOUT says otherwise."""

FINISH_SECONDS = 30.0
"""How long the last metrics may take to be sent at its end."""

SLOW_SECONDS = 15.0
"""A table or an artifact that takes longer was held up by a server that does not answer."""

PAUSE_SECONDS = 600.0
"""How long no other is attempted then: each could hold up the run for 20 s."""

ERRORS = "reward_model/worst"
PLOT = "reward_model/reliability"
"""The names of the table of a reward model's worst errors, and of the plot of its reliability."""

MAX_GROWTHS = 100
"""How often W&B lets a table grow in a run."""

log = logging.getLogger(__name__)


class WandbRun(Sink):
    """A W&B run that takes each figure once.

    Attributes:
        run: The run in the W&B library; None once it is closed or lost.
        logged: The figures that it has.
        folder: The folder of align's run.
        shown: How often each of its growing tables has grown.
        kept: The names and versions of the products that it has.
    """

    def __init__(self, run: Any, recorded: Recorded, folder: Path) -> None:
        self.run: Any | None = run
        self.logged = recorded.figures
        self.folder = folder
        self.shown = recorded.growths
        # Online, the server knows a version that it has; here is only what was meant to be sent to it.
        self.kept = recorded.kept if run.offline else set()
        self._tables: dict[str, Any] = {}
        self._paused_until = 0.0
        self._used: set[str] = set()

    def define_axes(self) -> None:
        """Have W&B plot the metrics of each stage over its own steps."""
        for stage in all_stages():
            if self.run is None:
                return
            with self._surviving():
                self.run.define_metric(stage.axis, hidden=True)
                for group in stage.metric_groups:
                    self.run.define_metric(f"{group}/*", step_metric=stage.axis)

    def log(self, stage: str, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Log those metrics of a step that have not been logged yet."""
        new = {name: value for name, value in metrics.items() if not self.logged.has(stage, step, name)}
        if self.run is None or not new:
            return
        with self._surviving():
            shown = {name: _shown_metric(value) for name, value in new.items()}
            self.run.log({**shown, find_stage(stage).axis: step})
        self.logged.add(stage, step, new)

    def show(self, table: str, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows of a step to a table, unless they are in it or W&B takes no more.

        Args:
            table: The table's name.
            stage: The stage's name.
            step: The step, counted from 1.
            rows: The rows, with the same keys in every step of a run.
        """
        if self.run is None or not rows or self.shown[table] >= MAX_GROWTHS or self.logged.has(stage, step, table):
            return
        if self._attempt(f"the {table} of step {step}", lambda run: self._grow(run, table, stage, step, rows)):
            self.shown[table] += 1
            self.logged.add(stage, step, [table])

    def show_errors(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]], plot: Path | None) -> None:
        """Log the worst errors of a reward model as a table, and the plot of its reliability as an image."""
        is_logged = self.logged.has(stage, step, ERRORS) or self.logged.has(stage, step, PLOT)
        if self.run is None or is_logged or not (rows or plot):
            return
        axis = {find_stage(stage).axis: step}
        if self._attempt("the errors of the reward model", lambda run: run.log(_shown_errors(rows, plot) | axis)):
            self.logged.add(stage, step, [ERRORS, PLOT])

    def keep(self, product: RunProduct) -> None:
        """Log a product as an artifact, unless it is logged, and what it was made from as its run's inputs."""
        if self.run is None or (product.name, product.version) in self.kept:
            return
        if self._attempt(f"the artifact {product.name}", lambda run: self._log_artifact(run, product)):
            self.kept.add((product.name, product.version))
            # What was evaluated has just been logged, and is no input of this run.
            for source in product.sources if product.kind != "evaluation" else ():
                self._use(source)

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

    def _grow(self, run: Any, table: str, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a table, and log it."""
        import wandb

        if table not in self._tables:
            self._tables[table] = wandb.Table(columns=["step", *rows[0]], log_mode="INCREMENTAL")
        for row in rows:
            self._tables[table].add_data(step, *row.values())
        run.log({table: self._tables[table], find_stage(stage).axis: step})

    def _log_artifact(self, run: Any, product: RunProduct) -> None:
        artifact = artifact_of(product, self.folder / "wandb" / "products")
        run.log_artifact(artifact, aliases=["latest", product.version])

    def _use(self, source: RunProduct) -> None:
        """Say that the run starts from an artifact. Offline, where W&B cannot, only the metadata says so."""
        name = f"{source.name}:{source.version}"
        if self.run is not None and not self.run.offline and name not in self._used:
            self._used.add(name)
            self._attempt(f"{name} as an input of the run", lambda run: run.use_artifact(name))

    def _attempt(self, what: str, send: Callable[[Any], object]) -> bool:
        """Send something about which W&B asks its server first; the run continues without it where that fails.

        A server that does not answer holds up each such call, so none is made for a while after one.

        Args:
            what: What is sent, for a warning.
            send: Sends it to the W&B run.

        Returns:
            Whether it is sent.
        """
        started = time.monotonic()
        if self.run is None or started < self._paused_until:
            return False
        is_sent = False
        with wandb_environment(self.folder):
            try:
                send(self.run)
                is_sent = True
            except Exception as error:  # a server that fails raises as many kinds as W&B's own process that is gone
                log.warning("W&B does not get %s: %s", what, first_line(error))
        if not self.run.offline and time.monotonic() - started > SLOW_SECONDS:
            log.warning("W&B's server hardly answers: it gets no table and no artifact for %.0f s", PAUSE_SECONDS)
            self._paused_until = time.monotonic() + PAUSE_SECONDS
        return is_sent

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
            folder = Path(run.dir).parent
            command = f"wandb sync --include-online {folder}"
            log.warning("W&B has not taken all metrics in %.0f s; `%s` sends them", FINISH_SECONDS, command)
        except Exception as error:
            log.warning("W&B did not end cleanly: %s", error)
        stop_wandb()


def _shown_metric(value: MetricValue) -> Any:
    """A metric as W&B takes it."""
    import wandb

    if not isinstance(value, dict):
        return value
    return wandb.Histogram(np_histogram=(value["counts"], bin_edges(value)))


def _shown_errors(rows: Sequence[Mapping[str, Any]], plot: Path | None) -> dict[str, Any]:
    """What W&B shows of a reward model's errors."""
    import wandb

    shown: dict[str, Any] = {}
    if rows:
        shown[ERRORS] = _table_of(rows)
    if plot:
        shown[PLOT] = wandb.Image(str(plot))
    return shown


def _table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A table of rows that need not have the same keys."""
    import wandb

    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    table = wandb.Table(columns=list(columns))
    for row in rows:
        table.add_data(*[row.get(name) for name in columns])
    return table


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
    with wandb_environment(run):
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
        recorded = read_recorded(run, _run_id(run), dict(wandb_run.summary))
    started = WandbRun(wandb_run, recorded, run)
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
            "W&B's server cannot be reached, so the run is tracked offline; `wandb sync %s` sends it: %s",
            run / "wandb" / "offline-run-*",
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


@contextmanager
def wandb_environment(run: Path) -> Iterator[None]:
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
