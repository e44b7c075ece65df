"""The event files of TensorBoard: each figure once, whatever has become of the run."""

import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from align.config.schema import TrackingSettings
from align.runs.tracking import drop_stages, open_tracker, truncate_after

ROOT = Path(__file__).parents[3]
TENSORBOARD = TrackingSettings(wandb="disabled", tensorboard=True)
KILLED = """
import os, signal, sys
from pathlib import Path
from align.config.schema import TrackingSettings
from align.runs.tracking import open_tracker
tracker = open_tracker(Path(sys.argv[1]), TrackingSettings(wandb="disabled", tensorboard=True), "tiny", {})
for step in (1, 2, 3):
    tracker.log("ppo", step, {"reward/mean": float(step)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def events(file: Path) -> Iterator[Event]:
    """The events of a file. Each is between its length with a checksum, 12 bytes, and a checksum of 4 bytes."""
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def figures(run: Path) -> list[tuple[str, int, float]]:
    """Name, step and value of all that the event files of a run hold."""
    found = []
    for file in sorted((run / "tensorboard").iterdir()):
        for event in events(file):
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def log_steps(run: Path, *steps: int) -> None:
    with open_tracker(run, TENSORBOARD, "tiny", {}) as tracker:
        for step in steps:
            tracker.log("ppo", step, {"reward/mean": float(step)})


def test_metrics_are_written_under_their_names_over_the_step_of_their_stage(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TENSORBOARD, "tiny", {}) as tracker:
        tracker.log("sft", 7, {"sft/loss": 2.0})
        tracker.log("ppo", 1, {"reward/mean": 0.5, "kl/per_token": 0.25})
    assert figures(tmp_path) == [("sft/loss", 7, 2.0), ("reward/mean", 1, 0.5), ("kl/per_token", 1, 0.25)]


def test_a_histogram_is_written_with_its_bins(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TENSORBOARD, "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"rollout/length_histogram": {"low": 2.5, "high": 6.5, "counts": [1, 0, 2, 1]}})
    (file,) = (tmp_path / "tensorboard").iterdir()
    (value,) = [value for event in events(file) for value in event.summary.value]
    histogram = value.histo
    assert value.tag == "rollout/length_histogram"
    assert (list(histogram.bucket_limit), list(histogram.bucket)) == ([3.5, 4.5, 5.5, 6.5], [1, 0, 2, 1])
    # Of 3, 5, 5 and 6.
    assert (histogram.num, histogram.sum, histogram.sum_squares) == (4, 19, 95)


def test_event_files_are_written_only_where_they_are_asked_for(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TrackingSettings(wandb="disabled"), "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": 0.5})
    assert not (tmp_path / "tensorboard").exists()


def test_a_killed_and_resumed_run_has_each_figure_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [step for _, step, _ in figures(tmp_path)] == [1, 2, 3]
    truncate_after(tmp_path, "ppo", 1)
    log_steps(tmp_path, 2, 3, 4)
    assert [step for _, step, _ in figures(tmp_path)] == [1, 2, 3, 4]


def test_a_stage_that_returns_to_its_checkpoint_has_each_figure_once(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TENSORBOARD, "tiny", {}) as tracker:
        for value in (1.0, 2.0):
            for step in (1, 2, 3):
                tracker.log("ppo", step, {"reward/mean": value})
            tracker.drop_after("ppo", 0)
        tracker.log("ppo", 1, {"reward/mean": 3.0})
    assert figures(tmp_path) == [("reward/mean", 1, 3.0)]


def test_a_figure_that_is_logged_again_replaces_the_first(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TENSORBOARD, "tiny", {}) as tracker:
        tracker.log("reward", 2, {"reward_model/heldout_accuracy": 0.5})
        tracker.log("reward", 2, {"reward_model/heldout_accuracy": 0.75})
    assert figures(tmp_path) == [("reward_model/heldout_accuracy", 2, 0.75)]


def test_figures_of_a_removed_stage_go(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TENSORBOARD, "tiny", {}) as tracker:
        tracker.log("sft", 1, {"sft/loss": 2.0})
        tracker.log("ppo", 1, {"reward/mean": 0.5})
    drop_stages(tmp_path, ["ppo"])
    log_steps(tmp_path)
    assert figures(tmp_path) == [("sft/loss", 1, 2.0)]


def test_a_run_that_turns_tensorboard_on_when_it_is_resumed_has_all_its_figures(tmp_path: Path) -> None:
    with open_tracker(tmp_path, TrackingSettings(wandb="disabled"), "tiny", {}) as tracker:
        tracker.log("ppo", 1, {"reward/mean": 1.0, "policy/gradient_norm": float("nan")})
    log_steps(tmp_path, 2)
    kept = figures(tmp_path)
    assert [(name, step) for name, step, _ in kept] == [
        ("reward/mean", 1),
        ("policy/gradient_norm", 1),
        ("reward/mean", 2),
    ]
    assert math.isnan(kept[1][2])


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    log_steps(tmp_path, 1)
    mine = tmp_path / "tensorboard" / "mine.txt"
    mine.write_text("x")
    log_steps(tmp_path, 2)
    assert mine.exists()
    assert len(os.listdir(mine.parent)) == 2
