"""What the command imports before it needs it: large libraries take seconds."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

LARGE = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "numpy",
    "peft",
    "ray",
    "torch",
    "transformers",
    "vllm",
    "wandb",
)
"""Libraries that a mistake in the file is reported without."""
REPORT = (
    "import atexit, json, sys\n"
    "atexit.register(lambda: print(json.dumps(list(sys.modules)), file=open('modules.json', 'w')))\n"
)


def imported(folder: Path, code: str, status: int, among: Sequence[str]) -> list[str]:
    """Which of some modules a program has imported when it ends, with this exit status."""
    ended = subprocess.run([sys.executable, "-c", REPORT + code], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    modules = json.loads((folder / "modules.json").read_text())
    return [name for name in among if name in modules]


def command(*arguments: str) -> str:
    return f"sys.argv = {['align', *arguments]!r}\nfrom align.cli import main\nmain()\n"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("export", "--help"), ("data", "check", "--help")]
)
def test_help_imports_no_settings_and_no_large_library(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert not imported(tmp_path, command(*arguments), 0, (*LARGE, "omegaconf", "align.config.schema"))


MISTAKES = {
    "an unknown key": "ppo: {step: 3}",
    "a wrong value": "ppo: {steps: many}",
    "settings that do not go together": "policy: {method: ia3, rank: 4}",
    "a term": "reward: {terms: {a: {kind: regexp}}}",
    "no YAML": "ppo: [",
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["plan", "run", "ppo"])
def test_a_mistake_in_the_file_is_reported_without_a_large_library(tmp_path: Path, name: str, mistake: str) -> None:
    (tmp_path / "x.yaml").write_text(f"name: x\nmodel: {{path: m}}\n{MISTAKES[mistake]}\n")
    assert not imported(tmp_path, command(name, "x.yaml"), 2, LARGE)


@pytest.mark.parametrize("override", ["ppo.step=3", "~ppo.steps", "ppo:={steps: many}"])
def test_a_mistake_in_an_override_is_reported_without_a_large_library(tmp_path: Path, override: str) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: m}\n")
    assert not imported(tmp_path, command("plan", "x.yaml", override), 2, LARGE)


def test_the_python_interface_reads_settings_without_a_large_library(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("name: x\nmodel: {path: m}\n")
    assert not imported(tmp_path, "import align\nalign.load_experiment('x.yaml')\n", 0, LARGE)
