"""The tracker against a server that records what it is sent: online, and by `wandb sync` of an offline run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.align.runs.wandb_server import SentRun, Server, serving

ROOT = Path(__file__).parents[3]
TRACK = """
import sys, time
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs import wandb_run
from align.runs.sink import RunProduct
from align.runs.tracking import open_tracker, truncate_after
wandb_run.FINISH_SECONDS = 3.0
run = Path(sys.argv[1])
mode = sys.argv[2]

def opened():
    return open_tracker(run, TrackingSettings(wandb=mode), "tiny", {"seed": 7}, "sft-ppo")

def product(name, *sources):
    path = run / f"{name}.bin"
    path.write_text(name)
    return RunProduct(f"tiny-{name}", "adapter", {"weights.bin": path}, {"rank": 2}, sources)
"""
STEPS_2_AND_3 = """
with opened() as tracker:
    for step in (2, 3):
        tracker.log("ppo", step, {"reward/mean": float(step)})
    start = time.monotonic()
print(time.monotonic() - start)
"""
EVERYTHING = """
with opened() as tracker:
    sft = product("sft")
    tracker.log("sft", 1, {"sft/loss": 2.0})
    tracker.keep(sft)
    tracker.log("ppo", 1, {"reward/mean": 1.0, "kl/per_token": 0.5})
    tracker.samples("ppo", 1, [{"prompt": "p", "response": "r"}], show=True)
    tracker.event("ppo", "rank lost", "rank 1 has died")
    time.sleep(1)  # an artifact can only be used once it is sent
    tracker.log("ppo", 2, {"reward/mean": 2.0, "kl/per_token": 0.25})
    tracker.keep(product("policy", sft))
"""
AGAIN_FROM_STEP_1 = """
truncate_after(run, "ppo", 1)
with opened() as tracker:
    for step in (2, 3):
        tracker.log("ppo", step, {"reward/mean": 10.0 * step, "kl/per_token": 0.125})
"""
SERVER_ENDS = """
import os, signal
with opened() as tracker:
    tracker.log("ppo", 1, {"reward/mean": 1.0})
    time.sleep(1)
    os.kill(int(sys.argv[3]), signal.SIGKILL)
    tracker.log("ppo", 2, {"reward/mean": 2.0})
    tracker.keep(product("sft"))
    tracker.samples("ppo", 2, [{"prompt": "p", "response": "r"}], show=True)
    tracker.log("ppo", 3, {"reward/mean": 3.0})
"""
SERVE = """
import sys, time
from tests.align.runs.wandb_server import serving
with serving() as server:
    print(server.address, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with these variables and no others of W&B. It must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT)} | variables
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def track(
    code: str, run: Path, variables: dict[str, str], *more: str, mode: str = "auto"
) -> subprocess.CompletedProcess[str]:
    """Track a run in a process of its own."""
    return python(run, "-c", TRACK + code, str(run), mode, *more, **variables)


def sync(run: Path, server: Server) -> None:
    """Send what an offline run has kept, in the order of its sessions."""
    folders = sorted(str(folder) for folder in (run / "wandb").glob("offline-run-*"))
    python(run, "-m", "wandb", "sync", *folders, **server.environment)


def figures(run: SentRun) -> list[dict[str, Any]]:
    """What the server has of the metrics, with the names of tables and images alone."""
    kept = []
    for item in run.history:
        names = {name: value for name, value in item.items() if not name.startswith("_")}
        kept.append({name: None if isinstance(value, dict) else value for name, value in names.items()})
    return kept


def artifacts(run: SentRun, kind: str = "adapter") -> list[dict[str, Any]]:
    """The artifacts of a kind, in a fixed order."""
    found = []
    for artifact in run.artifacts:
        if artifact["type"] == kind:
            found.append(artifact | {"aliases": sorted(artifact["aliases"])})
    return sorted(found, key=lambda artifact: str(artifact["name"]))


def test_an_online_run_and_a_synced_offline_one_give_the_server_the_same(tmp_path: Path, server: Server) -> None:
    track(EVERYTHING, tmp_path / "online", server.environment, mode="online")
    online = server.run
    server.runs.clear()
    track(EVERYTHING, tmp_path / "offline", {}, mode="offline")
    sync(tmp_path / "offline", server)
    offline = server.run
    assert figures(online) == [
        {"sft/step": 1, "sft/loss": 2.0},
        {"ppo/step": 1, "reward/mean": 1.0, "kl/per_token": 0.5},
        {"ppo/step": 1, "samples": None},
        {"ppo/step": 2, "reward/mean": 2.0, "kl/per_token": 0.25},
    ]
    assert figures(offline) == figures(online)
    assert offline.config == online.config == {"seed": 7}
    assert offline.alerts == online.alerts == [("rank lost", "rank 1 has died")]
    assert offline.attributes["jobType"] == online.attributes["jobType"] == "sft-ppo"
    assert artifacts(offline) == artifacts(online)
    assert [name for name in offline.files if name.startswith("media/table/samples")]
    assert offline.complete
    assert online.complete


def test_an_artifact_has_its_files_and_what_it_was_made_from(tmp_path: Path, server: Server) -> None:
    track(EVERYTHING, tmp_path, server.environment)
    policy, sft = artifacts(server.run)
    assert (sft["name"], sft["files"], sft["manifest"]) == ("tiny-sft", [b"sft"], ["weights.bin"])
    assert (policy["name"], policy["files"]) == ("tiny-policy", [b"policy"])
    assert sft["aliases"] == sorted(["latest", sft["metadata"]["sha256"][:12]])
    assert policy["metadata"]["rank"] == 2
    assert policy["metadata"]["started_from"] == {"tiny-sft": sft["metadata"]["sha256"]}
    assert server.used == ["tiny-sft"]


@pytest.mark.slow
def test_an_offline_run_that_was_resumed_is_sent_with_each_figure_once(tmp_path: Path, server: Server) -> None:
    track(EVERYTHING, tmp_path, {}, mode="offline")
    track(AGAIN_FROM_STEP_1, tmp_path, {}, mode="offline")
    sync(tmp_path, server)
    steps = [item["ppo/step"] for item in figures(server.run) if "reward/mean" in item]
    assert steps == [1, 2, 3]
    assert [artifact["name"] for artifact in artifacts(server.run)] == ["tiny-policy", "tiny-sft"]


def test_a_step_that_the_server_has_is_not_sent_again(tmp_path: Path, server: Server) -> None:
    track(STEPS_2_AND_3, tmp_path, server.environment)
    for file in tmp_path.glob("wandb/run-*/*.wandb"):
        file.unlink()
    track(STEPS_2_AND_3, tmp_path, server.environment)
    assert [(item["ppo/step"], item["reward/mean"]) for item in server.run.history] == [(2, 2.0), (3, 3.0)]


def test_a_server_that_falls_silent_does_not_hold_the_end_of_a_run(tmp_path: Path, server: Server) -> None:
    server.silent_stream = True
    done = track(STEPS_2_AND_3, tmp_path, server.environment)
    assert 3 <= float(done.stdout) < 20
    assert "W&B has not taken all metrics in 3 s; `wandb sync --include-online" in done.stderr


@pytest.mark.slow
def test_a_run_whose_server_dies_goes_on_and_says_how_to_send_the_rest(tmp_path: Path, server: Server) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVE], cwd=ROOT, stdout=subprocess.PIPE, text=True) as dying:
        assert dying.stdout is not None
        address = dying.stdout.readline().strip()
        variables = server.environment | {"WANDB_BASE_URL": address}
        done = track(SERVER_ENDS, tmp_path, variables, str(dying.pid))
    assert "no table and no artifact for 600 s" in done.stderr
    (folder,) = tmp_path.glob("wandb/run-*")
    assert f"W&B has not taken all metrics in 3 s; `wandb sync --include-online {folder}`" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3
    assert "W&B is lost" not in done.stderr
    python(tmp_path, "-m", "wandb", "sync", "--include-online", str(folder), **server.environment)
    assert [item["ppo/step"] for item in figures(server.run) if "reward/mean" in item] == [1, 2, 3]
