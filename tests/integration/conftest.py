"""Fixtures of whole runs."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.tiny_run import COMMAND, ENVIRONMENT, make_settings, run_in_process

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def align(tmp_path: Path) -> Command:
    """Run `align` with these arguments to its end. Gives its exit status and what it wrote."""

    def command(*arguments: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
        line = [*COMMAND, *map(str, arguments)]
        return subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)

    return command


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return make_settings(tiny_model, tmp_path)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through all stages in this process."""
    folder = tmp_path_factory.mktemp("finished")
    return run_in_process(make_settings(tiny_model, folder))
