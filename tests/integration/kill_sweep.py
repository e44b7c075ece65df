"""Kills a run at each of its writes in turn, resumes it, and compares its folder with that of an undisturbed run."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from tests.integration.tiny_run import ENVIRONMENT, is_timed

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "tiny"
NOT_COMPARED = {".lock", "report/index.html"}
"""What the process's number and the clock decide."""
MEASURED = ("time", "seconds", "peak_memory", "products", "state.json")
"""Keys of JSON files for what is measured, for hashes of folders whose `stage.json` has it, and for the size and hash
of a file that has both."""


def build_library(folder: Path) -> Path:
    """Compile the library that kills at a write."""
    library = folder / "kill_at_write.so"
    source = str(HERE / "kill_at_write.c")
    subprocess.run(["cc", "-std=gnu11", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"], check=True)
    return library


class WarmProcess:
    """A process that runs `align` in forked children, see `warm_process.py`."""

    def __init__(self, library: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.warm_process"],
            cwd=ROOT,
            env=ENVIRONMENT | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, arguments: Sequence[str], folder: Path, kill_at: int = 0) -> int:
        """Run a command in a folder. Returns its exit status."""
        job = {
            "arguments": list(arguments),
            "folder": str(folder),
            "watched": str(folder / "runs" / NAME),
            "kill_at": kill_at,
            "log": str(folder / "operations"),
            "output": str(folder / "output"),
        }
        standard_input: IO[str] = self.process.stdin  # type: ignore[assignment]
        standard_output: IO[str] = self.process.stdout  # type: ignore[assignment]
        standard_input.write(json.dumps(job) + "\n")
        standard_input.flush()
        return int(standard_output.readline())

    def close(self) -> None:
        self.process.communicate(timeout=60)


class Sweep:
    """The kills of one experiment.

    Attributes:
        operations: The operations of an undisturbed run, in order.
        kills: How many kills there were.
        failures: What went wrong, in words.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, process: WarmProcess, start: Path | None = None) -> None:
        """Run undisturbed.

        Args:
            settings: The settings.
            folder: A folder for all attempts.
            process: Runs them.
            start: A run's folder, from which each attempt starts; None: each starts with nothing.
        """
        self.folder = folder
        self.process = process
        self.start = start
        self.kills = 0
        self.failures: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "experiment.yaml").write_text(yaml.safe_dump(settings | {"name": NAME, "runs": "runs"}))
        whole = self.new_attempt("whole")
        status = self.run(whole)
        assert status == 0, (whole / "output").read_text()
        self.operations = (whole / "operations").read_text().splitlines()
        self.expected = contents(whole / "runs" / NAME)
        self._last_state: dict[str, Any] | None = None

    def kill_at_each(self, numbers: Iterable[int]) -> None:
        """Kill at each of these operations, counted from 1, in attempts of their own."""
        for number in numbers:
            attempt = self.new_attempt(f"killed-{number}")
            run = attempt / "runs" / NAME
            status = self.run(attempt, number)
            assert status == -signal.SIGKILL, f"operation {number}: {status}: {(attempt / 'output').read_text()}"
            self.kills += 1
            state = contents(run)
            if state != self._last_state:  # or it would be resumed to the same end
                self._last_state = state
                self._resume(attempt, self.operations[number - 1])
            shutil.rmtree(attempt)

    def _resume(self, attempt: Path, operation: str) -> None:
        status = self.run(attempt)
        if status:
            self.failures.append(f"{operation}: {status}: {(attempt / 'output').read_text()[-2000:]}")
            return
        found = contents(attempt / "runs" / NAME)
        for name in sorted(found.keys() | self.expected.keys()):
            if found.get(name) != self.expected.get(name):
                self.failures.append(f"{operation}: {name} {_difference(name in found, name in self.expected)}")

    def run(self, attempt: Path, kill_at: int = 0) -> int:
        """Start a run in the attempt's folder or, once it has begun, resume it. Returns the exit status."""
        return self.process.run(self._arguments(attempt), attempt, kill_at)

    def new_attempt(self, name: str) -> Path:
        """A folder, with the run that attempts start from, if there is one."""
        attempt = self.folder / name
        attempt.mkdir()
        if self.start:
            shutil.copytree(self.start, attempt / "runs" / NAME)
        return attempt

    def _arguments(self, attempt: Path) -> tuple[str, str]:
        if (attempt / "runs" / NAME / "config.yaml").exists():
            return ("resume", NAME)
        return ("run", "../experiment.yaml")


def _difference(is_found: bool, is_expected: bool) -> str:
    if not is_found:
        return "is missing"
    return "differs" if is_expected else "is left over"


def contents(run: Path) -> dict[str, Any]:
    """What each file of a run says, by its name, but for what the clock says; None for a folder."""
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if name not in NOT_COMPARED:
            found[re.sub(r"\.tmp\w{6}$", ".tmp", name)] = None if path.is_dir() else _timeless(path)
    return found


def _timeless(path: Path) -> Any:
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            return _without_measured(json.loads(data))
        if path.name in ("metrics.jsonl", "events.jsonl"):
            return [_without_measured(json.loads(line)) for line in data.splitlines()]
    except ValueError:  # half a file
        return data
    return data


def _without_measured(value: Any) -> Any:
    """A JSON value without what is measured."""
    if isinstance(value, dict):
        kept = {}
        for name, item in value.items():
            if name not in MEASURED and not is_timed(name):
                kept[name] = _without_measured(item)
        return kept
    return [_without_measured(item) for item in value] if isinstance(value, list) else value
