import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align.runs.checkpoint import CheckpointTimer, checkpoints, latest, new_checkpoint, prune, verify
from policies.errors import UserError

KILLED = """
import os, signal, sys
from pathlib import Path
from align.runs.checkpoint import new_checkpoint
with new_checkpoint(Path(sys.argv[1]), 2, keep=1) as folder:
    (folder / "weights").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write_steps(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        with new_checkpoint(folder, step, keep) as temporary:
            (temporary / "weights").write_bytes(b"w" * 100)
            (temporary / "policy").mkdir()
            (temporary / "policy" / "adapter").write_bytes(b"a" * step)


def flip_byte(checkpoint: Path) -> None:
    (checkpoint / "weights").write_bytes(b"w" * 99 + b"x")


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "weights", 50)


def remove_nested(checkpoint: Path) -> None:
    (checkpoint / "policy" / "adapter").unlink()


def add(checkpoint: Path) -> None:
    (checkpoint / "policy" / "foreign").write_text("not ours")


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def halve_manifest(checkpoint: Path) -> None:
    os.truncate(checkpoint / "manifest.json", 20)


DAMAGE = pytest.mark.parametrize("damage", [flip_byte, truncate, remove_nested, add, remove_manifest, halve_manifest])


def test_latest_is_the_newest_by_number(tmp_path: Path) -> None:
    write_steps(tmp_path, 2, 9, 10)
    assert latest(tmp_path) == tmp_path / "step-10"


def test_there_is_no_latest_without_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None


@DAMAGE
def test_latest_skips_a_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_steps(tmp_path, 1, 2)
    damage(tmp_path / "step-2")
    assert latest(tmp_path) == tmp_path / "step-1"


@DAMAGE
def test_a_damaged_checkpoint_does_not_verify(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_steps(tmp_path, 1)
    verify(tmp_path / "step-1")
    damage(tmp_path / "step-1")
    with pytest.raises(UserError, match="step-1"):
        verify(tmp_path / "step-1")


@DAMAGE
def test_damage_to_an_older_checkpoint_does_not_matter(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_steps(tmp_path, 1, 2)
    damage(tmp_path / "step-1")
    assert latest(tmp_path) == tmp_path / "step-2"


def test_the_manifest_lists_every_file_with_its_size(tmp_path: Path) -> None:
    write_steps(tmp_path, 3)
    files = json.loads((tmp_path / "step-3" / "manifest.json").read_text())["files"]
    assert {name: facts["size"] for name, facts in files.items()} == {"weights": 100, "policy/adapter": 3}


@pytest.mark.parametrize(("keep", "kept"), [(1, ["step-10"]), (2, ["step-9", "step-10"])])
def test_only_the_last_ones_are_kept(tmp_path: Path, keep: int, kept: list[str]) -> None:
    write_steps(tmp_path, 1, 2, 9, 10, keep=keep)
    assert [path.name for path in checkpoints(tmp_path)] == kept


def test_an_error_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    with pytest.raises(OSError, match="disk full"), new_checkpoint(tmp_path, 2, keep=1):
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    verify(tmp_path / "step-1")


def test_a_kill_while_writing_leaves_the_earlier_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert latest(tmp_path) == tmp_path / "step-1"
    write_steps(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_older_ones_are_counted_from_the_last_complete_one(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    flip_byte(tmp_path / "step-4")
    prune(tmp_path, keep=2, last=latest(tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["step-2", "step-3", "step-4"]
    prune(tmp_path, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4"]


def test_a_checkpoint_is_due_by_steps_or_by_minutes_since_the_last() -> None:
    by_steps = CheckpointTimer(every=3, minutes=1000)
    assert [step for step in range(1, 10) if by_steps.is_due(step)] == [3, 6, 9]
    by_minutes = CheckpointTimer(every=1000, minutes=10)
    assert not by_minutes.is_due(1)
    by_minutes.started -= 601  # as if so many seconds had passed
    assert by_minutes.is_due(2)
    by_minutes.restart()
    assert not by_minutes.is_due(3)
