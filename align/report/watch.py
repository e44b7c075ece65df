"""Serves a live page about runs on this machine."""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from align.outputs.run_list import seconds_left
from align.report.compare import compare_page, read_runs
from align.report.lamps import lamps
from align.report.page import report_page
from align.report.run_record import RunRecord, read_run_record
from align.runs.folder import RunFolder, is_locked
from align.runs.record_files import EVENTS, METRICS, SAMPLES
from align.runtime.wording import clock
from policies.errors import UserError

LOOPBACK = "127.0.0.1"
SHORTEST_SILENCE = 60.0
"""Seconds without a new step after which a run may count as stale."""
STEPS_OF_SILENCE = 10
"""How many times the usual time of a step a run must be silent for that."""
READ = ("config.yaml", METRICS, SAMPLES, EVENTS, "evaluation.json", "sft", "classifier", "reward", "policy")
"""Files and folders of a run on which its page depends."""


class LivePage:
    """The page about some runs, drawn again when their files have changed."""

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        """Serve the page of these runs."""
        self.runs = runs
        self._lock = Lock()
        self._state: tuple[object, ...] = ()
        self._page = ""

    def draw(self) -> str:
        """The page of what the runs' files hold now."""
        with self._lock:
            state = tuple(_state_of(run) for run in self.runs)
            if state != self._state:
                self._page = _draw(self.runs)
                self._state = state
            return self._page

    def answer(self, request: Request) -> Response:
        """The page, unless the browser has it already; what is wrong where a run cannot be read."""
        try:
            page = self.draw()
        except (UserError, OSError) as error:
            return PlainTextResponse(f"The run cannot be read: {error}", status_code=503)
        tag = f'"{sha256(page.encode(errors="replace")).hexdigest()[:32]}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return HTMLResponse(page.encode(errors="replace"), headers=headers)


def live_app(runs: Sequence[RunFolder], host: str = LOOPBACK) -> Starlette:
    """The web application. It answers only requests for its own address, so that no other site can read it.

    Args:
        runs: The runs to show.
        host: The address that it is served on.
    """
    allowed = [LOOPBACK, "localhost", host]
    return Starlette(
        routes=[Route("/", LivePage(runs).answer)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)],
    )


def serve_page(runs: Sequence[RunFolder], host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        runs: The runs to show; several are compared.
        host: The address to listen on.
        port: The port; 0: a free one.
        tell: Is given the address of the page once it can be opened.

    Raises:
        UserError: The address cannot be used, or a run cannot be read.
    """
    LivePage(runs).draw()
    with _listen(host, port) as listener:
        config = uvicorn.Config(live_app(runs, host), log_level="warning", access_log=False, lifespan="off")
        server = _Server(config, started=lambda: tell(f"http://{host}:{listener.getsockname()[1]}/"))
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """A server that says when it answers, and when it ends at a signal as it should."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"port {port} of {host} cannot be used: {error.strerror}; choose another --port, or 0 for a free one, or "
            "another --host"
        ) from None
    return listener


def _draw(runs: Sequence[RunFolder]) -> str:
    if len(runs) > 1:
        records = read_runs(runs)
        return compare_page(records, live={"lamps": lamps(records)}, title=f"{len(runs)} runs · align watch")
    record = read_run_record(runs[0].path, runs[0].read_evaluation())
    live: dict[str, Any] = {"lamps": lamps([record])}
    return report_page(_with_silence(record), live=live, title=_title(record))


def _with_silence(record: RunRecord) -> RunRecord:
    """The record, its state `stale` where a running run has been silent for too long."""
    return replace(record, state="stale") if _is_stale(record) else record


def _title(record: RunRecord) -> str:
    """What the tab says: how long PPO will still take, or why that is not known."""
    if _is_stale(record):
        return f"stale · {record.name}"
    left = _seconds_left(record)
    if left is not None:
        return f"{clock(left)} left · {record.name}"
    return f"{record.state} · {record.name}" if record.state else record.name


def _seconds_left(record: RunRecord) -> float | None:
    """How long PPO will still take; None where it is not running."""
    done = record.history.last_step("ppo")
    if record.state != "running" or record.experiment is None or done is None:
        return None
    return seconds_left(_step_seconds(record), record.experiment.ppo.steps - done)


def _step_seconds(record: RunRecord) -> list[float]:
    """The seconds of each step of PPO."""
    return [value for value in record.history.values("ppo", "time/step").values() if value is not None]


def _is_stale(record: RunRecord) -> bool:
    return record.state == "running" and _silence(record.path) > _longest_silence(record)


def _silence(run: Path) -> float:
    """Seconds since the run was last written to."""
    written = [path.stat().st_mtime for path in (run / METRICS, run / ".lock") if path.exists()]
    return time.time() - max(written, default=time.time())


def _longest_silence(record: RunRecord) -> float:
    """How long a healthy run may be silent."""
    seconds = _step_seconds(record)
    return max(SHORTEST_SILENCE, STEPS_OF_SILENCE * median(seconds)) if seconds else SHORTEST_SILENCE * STEPS_OF_SILENCE


def _state_of(run: RunFolder) -> tuple[object, ...]:
    """What changes whenever the page of a run does; a running run's page also changes with time."""
    files = []
    for name in READ:
        path = run.path / name
        if path.exists():
            status = path.stat()
            files.append((name, status.st_mtime_ns, status.st_size))
    is_running = is_locked(run)
    return (*files, is_running, int(_silence(run.path) / SHORTEST_SILENCE) if is_running else 0)
