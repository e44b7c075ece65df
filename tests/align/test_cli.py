"""What the command sets up before it does anything."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from align.cli import app, main

NAME = "THP_MEM_ALLOC_ENABLE"


@pytest.mark.parametrize(("preset", "expected"), [(None, "1"), ("0", "0")])
def test_large_pages_are_requested_unless_the_user_has_set_the_variable(
    preset: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, preset or "")
    if preset is None:
        monkeypatch.delenv(NAME)
    monkeypatch.setattr(sys, "argv", ["align", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ[NAME] == expected


@pytest.mark.parametrize("command", ["run", "plan", "sft"])
def test_a_mistake_in_the_file_is_reported_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: m}\nppo: {step: 3}\n")
    code = (
        "import atexit, sys\nfrom align.cli import main\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"sys.argv = ['align', '{command}', 'x.yaml']\nmain()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "x.yaml:3: ppo.step" in ended.stderr
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], ". is a folder; expected an experiment file"),
        (["ppo.steps=3", "x.yaml"], "ppo.steps=3: the experiment file comes first, then the settings as KEY=VALUE"),
        (["~ppo.steps", "x.yaml"], "~ppo.steps: the experiment file comes first, then the settings as KEY=VALUE"),
    ],
)
def test_a_wrong_experiment_file_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "x.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["align", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == f"error: {message}"


def commands_with_examples() -> dict[str, Any]:
    """The commands whose help ends with an example."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {name: command for name, command in commands.items() if command.epilog}


@pytest.mark.parametrize("name", commands_with_examples())
def test_the_example_in_the_help_of_a_command_is_one_that_it_takes(name: str) -> None:
    command = commands_with_examples()[name]
    program, first, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    assert (program, first) == ("align", name)
    assert command.make_context(name, arguments).params
