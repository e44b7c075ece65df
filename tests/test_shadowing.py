"""A user's file with the name of one of the four packages is named, wherever the packages are imported from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("policies", "rewards", "rollouts")


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_the_command_names_the_file_that_hides_a_package(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.py"
    file.write_text("def score(prompts, responses, columns): ...\n")
    ended = python(tmp_path, "-m", "align", "--help")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {file} hides the package `{name}` of align")
    assert "rename it" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("code", ["import align", "from align.outputs.trained_run import open_run"])
def test_an_import_names_the_file_that_hides_a_package(name: str, code: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.py"
    file.touch()
    ended = python(tmp_path, "-c", code)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"ImportError: {file} hides the package `{name}` of align")


def test_a_package_that_hides_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    file = tmp_path / "rewards" / "__init__.py"
    file.touch()
    assert f"{file} hides the package `rewards`" in python(tmp_path, "-m", "align", "--help").stderr


def test_a_folder_of_data_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rollouts").mkdir()
    assert python(tmp_path, "-m", "align", "--help").returncode == 0


def test_packages_elsewhere_on_the_path_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    assert python(tmp_path.parent, "-m", "align", "--help").returncode == 0
