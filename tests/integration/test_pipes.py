"""The command where nobody reads its output to the end, or where it may only be ASCII."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.tiny_run import COMMAND, ENVIRONMENT


def piped(folder: Path, *arguments: str, lines: int = 2, encoding: str = "utf-8") -> tuple[int, str, str]:
    """The exit status of `align … | head -LINES`, what head gave, and what the command wrote to standard error."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stderr
        head = [process.stdout.readline() for _ in range(lines)]
        process.stdout.close()
        errors = process.stderr.read()
        return process.wait(200), "".join(head), errors


@pytest.mark.slow
def test_a_run_goes_on_to_its_end_after_its_reader_is_gone(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    status, head, errors = piped(tmp_path, "run", "experiment.yaml")
    assert status == 0, errors
    assert "plan of tiny" in head
    assert "Traceback" not in errors
    assert (tmp_path / "runs" / "tiny" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_a_run_goes_on_without_readers_of_its_progress(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings | {"stages": ["sft"]}))
    command = 'set -o pipefail; "$@" 2>&1 | head -1'
    ended = subprocess.run(
        ["bash", "-c", command, "bash", *COMMAND, "run", "experiment.yaml"],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "runs" / "tiny" / "report" / "index.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "plan", "eval", "generate"])
def test_no_command_fails_where_nobody_reads(command: str, finished: Path) -> None:
    arguments = [str(finished / "config.yaml" if command == "plan" else finished)]
    if command == "generate":
        arguments += ["--prompt", "a → b"]
    status, _, errors = piped(finished, command, *arguments, lines=0)
    assert (status, "Traceback" in errors) == (0, False), errors


@pytest.mark.slow
def test_ascii_output_reads_well(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    status, head, errors = piped(tmp_path, "plan", "experiment.yaml", lines=3, encoding="ascii")
    assert status == 0, errors
    assert "sft -> reward -> ppo" in head
