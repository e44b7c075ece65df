"""Every file and folder that a run, an export or an average leaves has the mode that the user's umask gives."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from align.cli import app
from tests.integration.tiny_run import make_settings, run_in_process

UMASKS = (0o027, 0o002)


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of the process while the test runs."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """The modes that differ from those of new files and folders under this umask, by path."""
    wrong: dict[str, str] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != expected:
            wrong[str(path.relative_to(folder))] = oct(mode)
    return wrong


def align(*line: object) -> None:
    result = CliRunner().invoke(app, [str(part) for part in line])
    assert result.exit_code == 0, result.exception


def test_all_that_a_run_writes_has_the_users_umask(umask: int, tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    run = run_in_process(settings)
    align("report", run)
    align("export", run, "--to", tmp_path / "adapter")
    align("export", run, "--to", tmp_path / "model", "--merge")
    align("export", run, "--to", tmp_path / "classifier", "--reward")
    align("average", run / "sft", run / "policy", "--to", tmp_path / "average")
    for folder in (run, tmp_path / "adapter", tmp_path / "model", tmp_path / "classifier", tmp_path / "average"):
        assert len(list(folder.iterdir())) > 1
        assert not wrong_modes(folder, umask)


def test_a_full_model_and_a_prompt_table_have_the_users_umask(umask: int, tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft"]}
    full = run_in_process(settings | {"name": "full", "policy": {"method": "full"}})
    assert not wrong_modes(full, umask)
    prompts = run_in_process(settings | {"name": "prompts", "policy": {"method": "prompt_tuning", "virtual_tokens": 2}})
    (tmp_path / "tables").mkdir()
    align("export", prompts, "--to", tmp_path / "tables" / "prompts.safetensors", "--task", "one")
    assert not wrong_modes(tmp_path / "tables", umask)
