import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align.runtime.atomic_files import clean_up, new_folder, remove_folder, write_json

KILLED = """
import os, signal, sys
from pathlib import Path
from align.runtime.atomic_files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("new")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def fill(folder: Path, name: str) -> None:
    with new_folder(folder) as temporary:
        (temporary / name).write_text(name)


def half_fill(folder: Path, error: type[BaseException]) -> None:
    with new_folder(folder) as temporary:
        (temporary / "half").touch()
        raise error


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_has_its_name_only_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as temporary:
        assert temporary.is_dir()
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").is_dir()


def test_missing_parents_of_a_new_folder_are_created(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b", "x")
    assert files(tmp_path) == ["a", "a/b", "a/b/x"]


def test_a_new_folder_replaces_the_old_one_completely(tmp_path: Path) -> None:
    fill(tmp_path / "a", "old")
    fill(tmp_path / "a", "new")
    assert files(tmp_path) == ["a", "a/new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "a", "old")
    with pytest.raises(error):
        half_fill(tmp_path / "a", error)
    assert files(tmp_path) == ["a", "a/old"]


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), new_folder(tmp_path / "a"):
        raise OSError("disk full")
    assert files(tmp_path) == []


def test_a_kill_leaves_the_old_folder(tmp_path: Path) -> None:
    fill(tmp_path / "a", "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "a")], timeout=50)
    assert done.returncode == -signal.SIGKILL
    assert files(tmp_path / "a") == ["old"]


def test_leftovers_of_a_kill_are_not_in_the_next_folder(tmp_path: Path) -> None:
    for name in (".a.writing", ".a.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    fill(tmp_path / "a", "new")
    assert files(tmp_path) == ["a", "a/new"]


def test_json_is_read_back(tmp_path: Path) -> None:
    value = {"mean": 0.1, "none": None, "text": "猫", "rows": [1, 2]}
    write_json(tmp_path / "f.json", value)
    assert json.loads((tmp_path / "f.json").read_text()) == value
    assert files(tmp_path) == ["f.json"]


def test_a_value_that_is_not_json_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "f.json", {"a": 2, "b": object()})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 1}


def test_a_reader_of_the_old_file_never_sees_half_of_the_new_one(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"a": 1})
    with (tmp_path / "f.json").open() as reader:
        write_json(tmp_path / "f.json", {"a": 2})
        assert json.load(reader) == {"a": 1}
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 2}


def test_a_removed_folder_is_never_seen_half_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "a", "x")

    def kill(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("align.runtime.atomic_files.shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "a")
    assert files(tmp_path) == [".a.removed", ".a.removed/x"]


@pytest.mark.parametrize("name", [".a.writing", ".a.replaced", ".a.removed"])
def test_cleaning_up_removes_what_a_kill_left_beside_a_complete_folder(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "a", "x")
    fill(tmp_path / name, "y")
    clean_up(tmp_path)
    assert files(tmp_path) == ["a", "a/x"]


def test_cleaning_up_removes_half_written_files_and_folders_at_any_depth(tmp_path: Path) -> None:
    fill(tmp_path / "a" / ".b.writing", "x")
    fill(tmp_path / "a" / ".c.removed", "x")
    (tmp_path / ".d.json.writing").write_text("{")
    (tmp_path / ".notes").write_text("mine")
    clean_up(tmp_path)
    assert files(tmp_path) == [".notes", "a"]


def test_cleaning_up_restores_a_folder_that_was_being_replaced(tmp_path: Path) -> None:
    fill(tmp_path / ".a.replaced", "old")
    fill(tmp_path / ".a.writing", "new")
    clean_up(tmp_path)
    assert files(tmp_path) == ["a", "a/old"]
