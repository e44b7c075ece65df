"""A small server that speaks as much of W&B's protocol as a run needs, and records what it is sent."""

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = {"id": "e", "name": "me"}
PROJECT = {"id": "p", "name": "align", "entity": ENTITY}


@dataclass
class SentRun:
    """What the server has of a run."""

    attributes: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run."""
        values = json.loads(self.attributes["config"])
        return {name: value["value"] for name, value in values.items() if name != "_wandb"}


class Server(ThreadingHTTPServer):
    """Keeps what is sent, and can fall silent.

    Attributes:
        runs: What it has of each run, by the run's id.
        used: The artifacts that runs have said they use, by name.
        views: The saved views, by name.
        silent: Requests are never answered.
        silent_stream: Those that send metrics are never answered.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.runs: dict[str, SentRun] = {}
        self.used: list[str] = []
        self.views: dict[str, dict[str, Any]] = {}
        self.silent = False
        self.silent_stream = False
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which W&B is logged in to this server."""
        return {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": self.address}

    @property
    def run(self) -> SentRun:
        """The only run."""
        (run,) = self.runs.values()
        return run


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs within the block."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Answer(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self._answer({"data": self._data(name[1] if name else "", asked.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            if self.server.silent_stream:
                time.sleep(60)
            _store(self.server.runs[self.path.split("/")[-2]], json.loads(body))
        self._answer({})

    def do_PUT(self) -> None:
        _, kind, run, name = self.path.split("/", maxsplit=3)
        body = self._body()
        if kind == "file":
            self.server.runs[run].files[name] = body
        elif kind == "artifact":
            self.server.runs[run].artifacts[int(name.split("/")[0])]["files"].append(body)
        elif kind == "manifest":
            self.server.runs[run].artifacts[int(name)]["manifest"] = sorted(json.loads(body)["contents"])
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.silent:
            time.sleep(120)
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def _data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to a query or mutation. One that is not known has no data."""
        answer = getattr(self, f"_{name}", None)
        return answer(variables) if answer else {}

    def _Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _GetDefaultEntity(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me"}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"] or variables["id"]
        is_new = name not in self.server.runs
        run = self.server.runs.setdefault(name, SentRun())
        run.attributes |= {key: value for key, value in variables.items() if value is not None}
        return {"upsertBucket": {"bucket": _bucket(name, run), "inserted": is_new}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.get(variables["name"])
        return {"model": PROJECT | {"bucket": _bucket(variables["name"], run) if run else None}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = []
        for name in variables["files"]:
            files.append({"name": name, "uploadUrl": f"{self.server.address}/file/{variables['run']}/{name}"})
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, _, alias = variables["name"].partition(":")
        for run in self.server.runs.values():
            for artifact in run.artifacts:
                if artifact["name"] == name and (alias == "latest" or alias in artifact["aliases"]):
                    return {"project": {"artifact": {"artifactType": {"name": artifact["type"]}}}}
        return {"project": None}

    def _ArtifactMembershipByName(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, _, alias = variables["name"].partition(":")
        for run_name, run in self.server.runs.items():
            for number, artifact in enumerate(run.artifacts):
                if artifact["name"] == name and alias in artifact["aliases"]:
                    return {"project": {"artifactCollectionMembership": _membership(f"{run_name}/{number}", artifact)}}
        return {"project": None}

    def _UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, _, number = variables["artifactID"].partition("/")
        self.server.used.append(self.server.runs[run].artifacts[int(number)]["name"])
        return {"useArtifact": {"artifact": {"id": variables["artifactID"]}}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifacts = self.server.runs[variables["input"]["runName"]].artifacts
        aliases = [alias["alias"] for alias in variables["input"]["aliases"]]
        artifact = {
            "name": variables["input"]["artifactCollectionName"],
            "type": variables["input"]["artifactTypeName"],
            "aliases": aliases,
            "metadata": json.loads(variables["input"]["metadata"] or "{}"),
            "files": [],
            "manifest": [],
        }
        with self.server.lock:  # the client creates several at once
            artifacts.append(artifact)
            number = f"{variables['input']['runName']}/{len(artifacts) - 1}"
        return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": {"id": "s"}}}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        address = f"{self.server.address}/manifest/{variables['artifactID']}"
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": address, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        address = f"{self.server.address}/ignored/x/x"
        file = {"id": "f", "name": "m", "displayName": "m", "uploadUrl": address, "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for asked in variables["input"]["artifactFiles"]:
            address = f"{self.server.address}/artifact/{asked['artifactID']}/{asked['name']}"
            node = {
                "storagePath": asked["name"],
                "uploadUrl": address,
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": asked["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        is_new = name not in self.server.views
        self.server.views[name] = variables
        return {"upsertView": {"view": {"id": f"id of {name}", "name": name}, "inserted": is_new}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}

    def _NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.server.runs[variables["runName"]].alerts.append((variables["title"], variables["text"]))
        return {"notifyScriptableRunAlert": {"success": True}}


def _membership(number: str, artifact: dict[str, Any]) -> dict[str, Any]:
    """An artifact as W&B's client reads it when a run uses it."""
    project = PROJECT | {"internalId": "1"}
    return {
        "__typename": "ArtifactCollectionMembership",
        "id": "m",
        "versionIndex": 0,
        "createdAt": "2026-01-01T00:00:00",
        "aliases": [],
        "artifactCollection": {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project},
        "artifact": {
            "__typename": "Artifact",
            "id": number,
            "artifactSequence": {"__typename": "ArtifactSequence", "name": artifact["name"], "project": project},
            "versionIndex": 0,
            "artifactType": {"name": artifact["type"]},
            "description": None,
            "metadata": json.dumps(artifact["metadata"]),
            "ttlDurationSeconds": -1,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": "d",
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": None,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00",
            "updatedAt": None,
            "aliases": [],
        },
    }


def _bucket(name: str, run: SentRun) -> dict[str, Any]:
    """A run as W&B's client reads it when it starts or resumes it."""
    return {
        "id": name,
        "name": name,
        "displayName": run.attributes.get("displayName"),
        "description": None,
        "config": run.attributes.get("config", "{}"),
        "sweepName": None,
        "project": PROJECT,
        "summaryMetrics": json.dumps(run.summary),
        "historyTail": json.dumps([json.dumps(run.history[-1])] if run.history else []),
        "eventsTail": "[]",
        "historyLineCount": len(run.history),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "tags": run.attributes.get("tags") or [],
        "notes": run.attributes.get("notes"),
        "wandbConfig": '{"t": 1}',
    }


def _store(run: SentRun, sent: dict[str, Any]) -> None:
    """Store lines of the history at the place that the client gives them, and the latest summary."""
    files = sent.get("files") or {}
    if "wandb-history.jsonl" in files:
        chunk = files["wandb-history.jsonl"]
        run.history[chunk["offset"] :] = [json.loads(line) for line in chunk["content"]]
    if "wandb-summary.json" in files:
        run.summary = json.loads(files["wandb-summary.json"]["content"][-1])
    run.complete = run.complete or bool(sent.get("complete"))
