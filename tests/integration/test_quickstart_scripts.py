"""The scripts beside the quickstart say what they need."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT


@pytest.mark.parametrize("script", ["dtypes", "ensemble", "methods", "splits"])
def test_a_missing_run_is_one_message(script: str, tmp_path: Path) -> None:
    file = ROOT / "experiments" / "quickstart" / f"{script}.py"
    command = [sys.executable, str(file), "--run", "runs/nowhere", "--to", "runs/new"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "runs/nowhere/config.yaml does not exist: run `make quickstart` first"
    assert not (tmp_path / "runs").exists()
