"""The tracker against a small server that speaks as much of W&B's protocol as a run needs."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TRACK = """
import sys, time
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs import wandb_run
from align.runs.tracking import open_tracker
wandb_run.FINISH_SECONDS = 3.0
with open_tracker(Path(sys.argv[1]), TrackingSettings(), "tiny", {}) as tracker:
    for step in (2, 3):
        tracker.log("ppo", step, {"reward/mean": float(step)})
    start = time.monotonic()
print(time.monotonic() - start)
"""


class Server(ThreadingHTTPServer):
    """Knows a run up to its second step, keeps what is sent, and can fall silent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.silent = False
        self.history: list[dict[str, Any]] = []


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/graphql":
            self.answer({"data": data(json.loads(body)["query"])})
            return
        if self.path.endswith("/file_stream"):
            if self.server.silent:
                time.sleep(60)
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.server.history.append(json.loads(line))
        self.answer({})

    def answer(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def data(query: str) -> dict[str, Any]:
    """The answer to a query."""
    if "upsertBucket" in query:
        project = {"id": "p", "name": "align", "entity": {"id": "e", "name": "me"}}
        bucket: dict[str, Any] = {"id": "b", "name": "run", "displayName": "tiny", "config": "{}", "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": False}}
    if "RunResumeStatus" in query:
        known = {"ppo/step": 2, "reward/mean": 2.0, "_step": 1, "_runtime": 1}
        bucket = {
            "id": "b",
            "name": "run",
            "displayName": "tiny",
            "config": "{}",
            "summaryMetrics": json.dumps(known),
            "historyTail": json.dumps([json.dumps(known)]),
            "eventsTail": "[]",
            "historyLineCount": 2,
            "eventsLineCount": 0,
            "logLineCount": 0,
            "tags": [],
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "p", "name": "align", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}
    if "createRunFiles" in query:
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        threading.Thread(target=started.serve_forever, daemon=True).start()
        yield started
        started.shutdown()


def track(run: Path, server: Server) -> tuple[float, str]:
    """Log steps 2 and 3 of a run, in a process of its own. Returns the seconds of its end, and what it said."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    command = [sys.executable, "-c", TRACK, str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout), done.stderr


def test_a_step_that_the_server_has_is_not_sent_again(tmp_path: Path, server: Server) -> None:
    track(tmp_path, server)
    assert [(line["ppo/step"], line["reward/mean"]) for line in server.history] == [(3, 3.0)]


def test_a_server_that_falls_silent_does_not_hold_the_end_of_a_run(tmp_path: Path, server: Server) -> None:
    server.silent = True
    seconds, said = track(tmp_path, server)
    assert 3 <= seconds < 20
    assert "W&B has not taken all metrics in 3 s; `wandb sync" in said
