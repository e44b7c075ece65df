import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.config.schema import TrackingSettings
from align.runs import wandb_run
from align.runs.histogram import Histogram
from align.runs.record_files import read_lines
from align.runs.tracking import Tracker, drop_stages, open_tracker, truncate_after
from policies.errors import UserError
from tests.align.runs.wandb_files import records_in_wandb

ROOT = Path(__file__).parents[3]
DISABLED = TrackingSettings(wandb="disabled")
OFFLINE = TrackingSettings(wandb="offline")
OPEN = """
import sys
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs import wandb_run
from align.runs.tracking import open_tracker
from policies.errors import UserError
wandb_run.INIT_SECONDS = 1.0
try:
    with open_tracker(Path(sys.argv[1]), TrackingSettings(wandb=sys.argv[2]), "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": 0.5})
except UserError as error:
    print(error)
"""


SHOW = """
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs.tracking import open_tracker
with open_tracker(Path({run!r}), TrackingSettings(wandb="offline"), "tiny", {{}}) as tracker:
    for step in {steps!r}:
        row = {{"prompt": "p", "response": f"r{{step}}", "score": float(step)}}
        tracker.samples("ppo", step, [row], show=True)
"""


LOSE = """
import sys
from pathlib import Path
import psutil
from align.config.schema import TrackingSettings
from align.runs.tracking import open_tracker
with open_tracker(Path(sys.argv[1]), TrackingSettings(wandb="offline"), "tiny", {}) as tracker:
    tracker.log("ppo", 1, {"reward/mean": 0.5})
    started = psutil.Process().children(recursive=True)
    for process in started:
        process.kill()
    psutil.wait_procs(started, timeout=10)
    tracker.log("ppo", 2, {"reward/mean": 0.5})
    tracker.log("ppo", 3, {"reward/mean": 0.5})
"""


KILLED = """
import os, signal, sys
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), TrackingSettings(wandb="offline"), "tiny", {})
for step in (1, 2):
    tracker.log("ppo", step, {"reward/mean": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """All lines, read by a parser that refuses NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]


def steps(run: Path, name: str = "metrics.jsonl") -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in strict_lines(run / name)]


def write_steps(run: Path, *lines: tuple[str, int]) -> None:
    with open_tracker(run, DISABLED, "tiny", {}) as tracker:
        for stage, step in lines:
            tracker.log(stage, step, {"x": 1.0})
            tracker.samples(stage, step, [{"prompt": "p"}])


def open_in_subprocess(run: Path, mode: str, home: Path, **environment: str) -> str:
    """Open and close a tracker in a separate process with this home. Returns what it printed."""
    environment |= {"HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OPEN, str(run), mode]
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return done.stdout + done.stderr


def test_a_step_is_a_line_with_stage_and_step(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.log("ppo", 3, {"reward/mean": 0.5, "rollout/tokens": 7})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"stage": "ppo", "step": 3, "reward/mean": 0.5, "rollout/tokens": 7}
    ]


def test_a_line_is_on_disk_before_the_tracker_closes(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": 0.5})
        assert steps(tmp_path) == [("ppo", 1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_becomes_null(tmp_path: Path, value: float) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": value})
        tracker.samples("ppo", 1, [{"parts": {"rule": [value, 1.0]}}])
    assert strict_lines(tmp_path / "metrics.jsonl")[0]["reward/mean"] is None
    assert strict_lines(tmp_path / "samples.jsonl")[0]["parts"] == {"rule": [None, 1.0]}


@pytest.mark.parametrize("text", ["zwei\nZeilen", "猫", "\u2028", "half a pair: \ud83d"])
def test_any_text_of_a_sample_is_read_back(tmp_path: Path, text: str) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.samples("ppo", 1, [{"response": text}, {"response": "next"}])
    assert [row["response"] for row in read_lines(tmp_path / "samples.jsonl")] == [text, "next"]


def test_truncating_drops_larger_steps_and_later_stages(tmp_path: Path) -> None:
    write_steps(tmp_path, ("sft", 9), ("reward", 1), ("reward", 2), ("reward", 3), ("ppo", 1), ("evaluation", 1))
    truncate_after(tmp_path, "reward", 2)
    expected = [("sft", 9), ("reward", 1), ("reward", 2)]
    assert steps(tmp_path) == steps(tmp_path, "samples.jsonl") == expected


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    write_steps(tmp_path, *(("ppo", step) for step in (1, 2, 3, 4)))
    truncate_after(tmp_path, "ppo", 2)
    write_steps(tmp_path, *(("ppo", step) for step in (3, 4, 5)))
    assert steps(tmp_path) == [("ppo", step) for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize("half", ['{"stage": "ppo", "st', "{", '{"stage": "ppo", "step": 1, "x": "ü'.encode()[:-1]])
def test_truncating_drops_a_half_written_line(tmp_path: Path, half: str | bytes) -> None:
    write_steps(tmp_path, ("ppo", 1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(half if isinstance(half, bytes) else half.encode())
    truncate_after(tmp_path, "ppo", 1)
    write_steps(tmp_path, ("ppo", 2))
    assert steps(tmp_path) == [("ppo", 1), ("ppo", 2)]


def test_a_figure_that_is_logged_again_stands_once(tmp_path: Path) -> None:
    for value in (0.5, 0.75):
        with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
            tracker.log("reward", 2, {"reward_model/heldout_accuracy": value})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"stage": "reward", "step": 2, "reward_model/heldout_accuracy": 0.75}
    ]


def test_the_other_figures_of_a_step_stay_when_one_is_logged_again(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.log("reward", 1, {"reward_model/loss": 1.0})
        tracker.log("reward", 2, {"reward_model/loss": 2.0, "reward_model/heldout_loss": 3.0})
        tracker.log("reward", 2, {"reward_model/loss": 4.0})
        tracker.log("reward", 1, {"reward_model/loss": 5.0})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"stage": "reward", "step": 2, "reward_model/heldout_loss": 3.0},
        {"stage": "reward", "step": 2, "reward_model/loss": 4.0},
        {"stage": "reward", "step": 1, "reward_model/loss": 5.0},
    ]


def test_probes_and_samples_of_a_step_do_not_replace_each_other(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.samples("ppo", 1, [{"response": "old"}])
        tracker.probes("ppo", 1, [{"reference": "r", "response": "old probe"}])
    written = []
    for write in (Tracker.samples, Tracker.probes):
        with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
            write(tracker, "ppo", 1, [{"response": "new"} | ({"reference": "r"} if write is Tracker.probes else {})])
        written.append([row["response"] for row in strict_lines(tmp_path / "samples.jsonl")])
    assert written == [["old probe", "new"], ["new", "new"]]


def test_samples_that_are_written_again_stand_once(tmp_path: Path) -> None:
    for response in ("old", "new"):
        with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
            tracker.samples("ppo", 1, [{"response": response}, {"response": response}])
    assert [row["response"] for row in strict_lines(tmp_path / "samples.jsonl")] == ["new", "new"]


def test_steps_are_logged_once_when_a_stage_returns_to_its_checkpoint(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        for step in (1, 2, 3):
            tracker.log("ppo", step, {"x": 1.0})
        tracker.drop_after("ppo", 1)
        for step in (2, 3):
            tracker.log("ppo", step, {"x": 2.0})
    assert steps(tmp_path) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]


@pytest.mark.parametrize("last", ['{"stage": "ppo", "st', '{"stage": "ppo", "step": 2, "x": 1.0}'])
def test_a_line_without_its_end_is_ended_or_dropped_before_the_next(tmp_path: Path, last: str) -> None:
    write_steps(tmp_path, ("ppo", 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(last)
    write_steps(tmp_path, ("ppo", 2))
    assert steps(tmp_path) == [("ppo", 1), ("ppo", 2)]


def test_removed_stages_leave_no_lines_and_end_the_wandb_run(tmp_path: Path) -> None:
    write_steps(tmp_path, ("sft", 1), ("reward", 1), ("ppo", 1))
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id").write_text("abc")
    drop_stages(tmp_path, ["dpo"])
    assert (tmp_path / "wandb" / "id").exists()
    drop_stages(tmp_path, ["reward", "ppo"])
    assert steps(tmp_path) == steps(tmp_path, "samples.jsonl") == [("sft", 1)]
    assert not (tmp_path / "wandb" / "id").exists()


def test_events_stay_when_steps_run_again_and_go_with_their_stage(tmp_path: Path) -> None:
    with open_tracker(tmp_path, DISABLED, "tiny", {}) as tracker:
        tracker.event("sft", "out of memory", "too large")
        tracker.log("ppo", 7, {"reward/mean": 0.5})
        tracker.event("ppo", "rank lost", "rank 1 has died")
        tracker.drop_after("ppo", 0)
    events = read_lines(tmp_path / "events.jsonl")
    assert [(row["stage"], row["step"], row["event"], row["text"]) for row in events] == [
        ("sft", -1, "out of memory", "too large"),
        ("ppo", 7, "rank lost", "rank 1 has died"),
    ]
    drop_stages(tmp_path, ["ppo"])
    assert read_lines(tmp_path / "events.jsonl") == events[:1]


def test_truncating_a_run_without_files_does_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path, "sft", 0)
    assert list(tmp_path.iterdir()) == []


def test_truncating_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_steps(tmp_path, ("ppo", 1))
    truncate_after(tmp_path, "ppo", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "samples.jsonl"]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "ppo", "step": 1}\n{"sta\n{"stage": "ppo", "step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        truncate_after(tmp_path, "ppo", 3)


def test_a_reopened_run_is_the_same_wandb_run_in_its_own_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        with open_tracker(run, OFFLINE, "tiny", {"seed": 0}) as tracker:
            tracker.log("ppo", step, {"reward/mean": 0.5})
    name = (run / "wandb" / "id").read_text()
    records = list(run.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert records
    assert all(b"reward/mean" in path.read_bytes() for path in records)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert capfd.readouterr() == ("", "")


def logged_to_wandb(run: Path) -> list[tuple[int, float]]:
    """Step and value of a metric of PPO, as often as W&B's files hold it."""
    items = [record["item"] for record in records_in_wandb(run, "history")]
    return [(item["ppo/step"], item["reward/mean"]) for item in items]


def test_steps_that_run_again_are_in_wandb_once(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):
        truncate_after(tmp_path, "ppo", first - 1)
        with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
            for step in range(first, last + 1):
                tracker.log("ppo", step, {"reward/mean": float(step)})
    assert logged_to_wandb(tmp_path) == [(step, float(step)) for step in range(1, 6)]


def test_a_killed_run_that_returns_to_its_checkpoint_has_each_figure_in_wandb_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    truncate_after(tmp_path, "ppo", 1)
    with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
        for step in (2, 3):
            tracker.log("ppo", step, {"reward/mean": 10.0 * step, "kl/per_token": 0.5})
            tracker.log("ppo", step, {"eval/score_mean": 1.0})
    figures = []
    for record in records_in_wandb(tmp_path, "history"):
        item = record["item"]
        figures += [(item["ppo/step"], name) for name in item if not name.startswith("_") and name != "ppo/step"]
    assert sorted(figures) == [(1, "reward/mean")] + [
        (step, name) for step in (2, 3) for name in ("eval/score_mean", "kl/per_token", "reward/mean")
    ]


def test_steps_that_wandb_loses_when_the_run_is_killed_are_logged_when_it_is_resumed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
        tracker.log("ppo", 3, {"reward/mean": 3.0})
    assert logged_to_wandb(tmp_path) == [(step, float(step)) for step in (1, 2, 3)]


def test_a_histogram_is_in_wandb_once(tmp_path: Path) -> None:
    histogram: Histogram = {"low": 0.0, "high": 2.0, "counts": [3, 1]}
    with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": 0.5, "reward/histogram": histogram})
    with open_tracker(tmp_path, OFFLINE, "tiny", {}):
        pass
    (item,) = [record["item"] for record in records_in_wandb(tmp_path, "history")]
    assert (item["reward/histogram.bins"], item["reward/histogram.values"]) == ([0, 1, 2], [3, 1])


def test_settings_say_how_wandb_shows_the_run(tmp_path: Path) -> None:
    settings = TrackingSettings(
        wandb="offline", project="mine", entity="team", group="seeds", tags=["a", "b"], notes="a note"
    )
    with open_tracker(tmp_path, settings, "tiny", {"seed": 0}, "sft-ppo") as tracker:
        tracker.log("ppo", 1, {"reward/mean": 0.5})
    (record,) = records_in_wandb(tmp_path, "run")
    shown = {name: record[name] for name in ("project", "entity", "run_group", "tags", "notes", "job_type")}
    assert shown == {
        "project": "mine",
        "entity": "team",
        "run_group": "seeds",
        "tags": ["a", "b"],
        "notes": "a note",
        "job_type": "sft-ppo",
    }


def test_the_table_of_samples_grows_once_per_step_in_the_runs_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    home = tmp_path / "home"
    for steps in ((1, 2), (2, 3)):
        code = SHOW.format(run=str(run), steps=steps)
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"HOME": str(home)}, cwd=ROOT, check=True)
    grown = [record["item"] for record in records_in_wandb(run, "history") if "samples._type" in record["item"]]
    assert [item["ppo/step"] for item in grown] == [1, 2, 3]
    tables = [json.loads(path.read_text()) for path in sorted(run.glob("wandb/offline-run-*/files/media/table/*.json"))]
    assert all(table["columns"] == ["step", "prompt", "response", "score"] for table in tables)
    assert sorted(tuple(row) for table in tables for row in table["data"]) == [
        (1, "p", "r1", 1.0),
        (2, "p", "r2", 2.0),
        (3, "p", "r3", 3.0),
    ]
    assert not list(home.rglob("*"))


def test_the_table_of_samples_stops_growing_where_wandb_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "MAX_GROWTHS", 1)
    for steps in ((1, 2), (3,)):
        with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
            for step in steps:
                tracker.samples("ppo", step, [{"prompt": "p"}], show=True)
    grown = [record["item"] for record in records_in_wandb(tmp_path, "history")]
    assert [item["ppo/step"] for item in grown] == [1]


def test_the_first_event_of_a_kind_is_an_alert_in_wandb(tmp_path: Path) -> None:
    for rank in (1, 2):
        with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
            tracker.event("ppo", "rank lost", f"rank {rank} has died")
    with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
        tracker.event("ppo", "fault", "the gradient was not finite")
    alerts = [(alert["title"], alert["text"]) for alert in records_in_wandb(tmp_path, "alert")]
    assert alerts == [("rank lost", "rank 1 has died"), ("fault", "the gradient was not finite")]
    assert len(read_lines(tmp_path / "events.jsonl")) == 3


class Recorder:
    """A W&B run that the server knows up to step 3."""

    def __init__(self) -> None:
        self.summary = {"ppo/step": 3, "reward/mean": 3.0}
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, **settings: Any) -> None:
        """W&B's own has no effect on what is logged."""

    def log(self, metrics: dict[str, float]) -> None:
        self.logged.append(metrics)

    def finish(self, exit_code: int) -> None:
        raise TimeoutError

    dir = "wandb/run-1/files"
    offline = False


def test_steps_that_only_the_server_has_are_not_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(wandb_run, "_init", lambda *arguments: recorder)
    write_steps(tmp_path, ("ppo", 1), ("ppo", 2))
    with open_tracker(tmp_path, OFFLINE, "tiny", {}) as tracker:
        for step in (3, 4):
            tracker.log("ppo", step, {"reward/mean": float(step)})
    assert recorder.logged == [{"reward/mean": 4.0, "ppo/step": 4}]
    assert "W&B has not taken all metrics in 30 s; `wandb sync --include-online wandb/run-1` sends them" in caplog.text


def test_a_closed_tracker_leaves_no_wandb_process(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    tracker = open_tracker(tmp_path, OFFLINE, "tiny", {})
    started = set(psutil.Process().children(recursive=True)) - before
    tracker.close()
    tracker.close()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert started
    assert not alive


def test_logging_continues_when_wandb_dies(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOSE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("W&B is lost; the run continues without it") == 1
    assert "Traceback" not in done.stderr
    assert steps(tmp_path) == [("ppo", 1), ("ppo", 2), ("ppo", 3)]


def test_auto_is_offline_where_nobody_is_logged_in_and_writes_nothing_in_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert open_in_subprocess(tmp_path / "run", "auto", home) == ""
    assert list(tmp_path.glob("run/wandb/offline-run-*"))
    assert list(home.iterdir()) == []


def test_auto_follows_wandb_mode(tmp_path: Path) -> None:
    assert open_in_subprocess(tmp_path / "run", "auto", tmp_path, WANDB_MODE="disabled") == ""
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_wandb_mode_that_does_not_exist_is_a_user_error(tmp_path: Path) -> None:
    assert "tracking.wandb" in open_in_subprocess(tmp_path / "run", "auto", tmp_path, WANDB_MODE="sometimes")


@pytest.fixture(params=["nobody listens", "nobody answers"])
def unreachable(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a server that cannot be reached."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "nobody answers":
            server.listen()  # connections are taken by the kernel, and nothing is ever said on them
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


LOGIN = {"WANDB_API_KEY": "a" * 40}


@pytest.mark.slow
def test_auto_goes_offline_with_a_word_where_the_server_does_not_answer_in_time(
    tmp_path: Path, unreachable: str
) -> None:
    output = open_in_subprocess(tmp_path / "run", "auto", tmp_path, **LOGIN, WANDB_BASE_URL=unreachable)
    command = f"`wandb sync {tmp_path}/run/wandb/offline-run-*` sends it"
    assert output.startswith(f"W&B's server cannot be reached, so the run is tracked offline; {command}")
    assert logged_to_wandb(tmp_path / "run") == [(1, 0.5)]


@pytest.mark.slow
def test_online_says_what_to_set_where_the_server_does_not_answer_in_time(tmp_path: Path, unreachable: str) -> None:
    output = open_in_subprocess(tmp_path / "run", "online", tmp_path, **LOGIN, WANDB_BASE_URL=unreachable)
    assert output.startswith("W&B cannot start")
    assert "Set tracking.wandb to offline" in output


def test_online_without_a_login_is_a_user_error(tmp_path: Path) -> None:
    output = open_in_subprocess(tmp_path / "run", "online", tmp_path, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "wandb login" in output
