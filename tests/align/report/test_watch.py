import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")
from starlette.testclient import TestClient

from align.diagnosis.verdict import Severity, Verdict
from align.report.lamps import VITAL_SIGNS, lamps
from align.report.watch import live_app, serve_page
from align.runs.folder import RunFolder, locked
from policies.errors import UserError
from tests.align.report.runs import record, step, write_run

ROOT = Path(__file__).parents[3]
HERE = "http://127.0.0.1:8420"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    write_run(tmp_path / "first")
    return RunFolder(tmp_path / "first")


def title(page: str) -> str:
    found = re.search(r"<title>(.*?)</title>", page)
    assert found
    return found[1]


def test_a_page_that_the_browser_has_is_not_sent_again(run: RunFolder) -> None:
    client = TestClient(live_app([run]), base_url=HERE)
    first = client.get("/")
    tag = {"If-None-Match": first.headers["ETag"]}
    assert (first.status_code, client.get("/", headers=tag).status_code) == (200, 304)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(41, reward__mean=7.5)) + "\n")
    again = client.get("/", headers=tag)
    assert again.status_code == 200
    assert "7.5" in again.text


def test_a_run_that_becomes_unreadable_is_told_until_it_can_be_read_again(run: RunFolder) -> None:
    client = TestClient(live_app([run]), base_url=HERE)
    metrics = run.path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text('{"stage": "ppo", "st\n' + whole)
    answer = client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "text/plain; charset=utf-8")
    assert answer.text.startswith(f"The run cannot be read: {metrics}, line 1")
    metrics.write_text(whole)
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1:8420"])
def test_a_request_under_another_name_is_refused(run: RunFolder, host: str) -> None:
    client = TestClient(live_app([run]), base_url=HERE)
    assert client.get("/", headers={"Host": host}).status_code == 400


def test_the_title_of_a_running_run_is_how_long_it_takes(run: RunFolder) -> None:
    (run.path / "metrics.jsonl").write_text(json.dumps(step(20, reward__mean=1.0, time__step=3.0)) + "\n")
    with locked(run):
        assert title(TestClient(live_app([run]), base_url=HERE).get("/").text) == "1:00 left · first"


def test_a_running_run_without_new_steps_is_stale(run: RunFolder) -> None:
    with locked(run):
        long_ago = time.time() - 3600
        for name in ("metrics.jsonl", ".lock"):
            os.utime(run.path / name, (long_ago, long_ago))
        page = TestClient(live_app([run]), base_url=HERE).get("/").text
    assert title(page) == "stale · first"
    assert 'data-state="stale"' in page


def test_a_run_that_has_ended_is_not_stale(run: RunFolder) -> None:
    os.utime(run.path / "metrics.jsonl", (0, 0))
    assert title(TestClient(live_app([run]), base_url=HERE).get("/").text) == "done · first"


def test_several_runs_are_compared(run: RunFolder, tmp_path: Path) -> None:
    write_run(tmp_path / "second", steps=20)
    page = TestClient(live_app([run, RunFolder(tmp_path / "second")]), base_url=HERE).get("/").text
    assert "Comparison of 2 runs" in page
    assert page.count('<li class="lamp') == 10


def test_there_are_ten_lamps_and_every_verdict_has_one() -> None:
    rules = [path.read_text() for path in (ROOT / "align" / "diagnosis").glob("*_rules.py")]
    names = set(re.findall(r'name="([^"]+)"', "".join(rules)))
    watched = [name for sign in VITAL_SIGNS for name in sign.verdicts]
    assert len(VITAL_SIGNS) == 10
    assert sorted(watched) == sorted(names)


def test_a_lamp_is_off_until_there_is_a_figure_and_shows_the_worst_verdict(tmp_path: Path) -> None:
    quiet = record(tmp_path / "a", [step(1, policy__entropy=1.0)])
    by_name = {lamp.name: lamp.tone for lamp in lamps([quiet])}
    assert (by_name["Entropy"], by_name["KL"]) == ("good", "off")
    verdicts = [
        Verdict("KL too weak", Severity.WARNING, "ppo", "", (), ()),
        Verdict("KL too strong", Severity.SERIOUS, "ppo", "", (), ()),
    ]
    noisy = replace(record(tmp_path / "b"), verdicts=verdicts)
    lamp = next(lamp for lamp in lamps([quiet, noisy]) if lamp.name == "KL")
    assert (lamp.tone, lamp.says) == ("serious", "KL too strong")


def test_a_port_that_is_taken_is_an_error(run: RunFolder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
            serve_page([run], "127.0.0.1", port, print)


def test_the_command_prints_its_address_and_ends_on_ctrl_c(run: RunFolder) -> None:
    command = [sys.executable, "-m", "align", "watch", str(run.path), "--port", "0"]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert watching.stdout
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", watching.stdout.readline())
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=60)
    assert (watching.returncode, "Traceback" in errors) == (0, False)
