"""A user's file with the name of one of the four packages is named, wherever the packages are imported from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.schema import Experiment
from align.runtime.shadowing import package_hidden_from_workers
from align.stages.pipeline import load_datasets
from policies.errors import UserError
from tests.integration.tiny_run import make_settings

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


def test_the_installed_command_does_not_look_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    command = Path(sys.executable).parent / "align"
    assert subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True).returncode == 0


def test_packages_elsewhere_on_the_path_hide_nothing(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    assert python(tmp_path.parent, "-m", "align", "--help").returncode == 0


@pytest.mark.parametrize(("section", "key"), [("rollouts", "workers"), ("learner", "ranks")])
def test_a_file_that_hides_a_package_from_rays_workers_is_named_before_anything_is_trained(
    section: str, key: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(tiny_model, tmp_path)
    file = tmp_path / "rewards.py"
    file.touch()
    monkeypatch.chdir(tmp_path)
    load_datasets(Experiment.model_validate(settings))  # this process has align's own package
    settings[section][key] = 1
    with pytest.raises(UserError, match=f"{file} hides the package `rewards` of align"):
        load_datasets(Experiment.model_validate(settings))


@pytest.mark.slow
def test_rays_workers_look_in_the_current_folder_first(tmp_path: Path) -> None:
    program = tmp_path / "program" / "main.py"
    program.parent.mkdir()
    program.write_text(
        "import ray\n"
        "ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)\n"
        "@ray.remote\ndef first():\n    import sys\n    return sys.path[0]\n"
        "print(ray.get(first.remote()))\n"
    )
    ended = python(tmp_path, str(program))
    assert ended.stdout.split()[-1] == str(tmp_path), ended.stderr


def test_alike_folders_hide_nothing_from_rays_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rewards").mkdir()
    monkeypatch.chdir(tmp_path)
    assert package_hidden_from_workers() is None
