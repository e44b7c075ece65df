"""Runs whose controller is on one of the machines, and what they say."""

import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.cluster.machines import Machine

END = 600
"""Seconds after which a run hangs."""


class Run:
    """`align run` on a machine."""

    def __init__(self, machine: Machine, settings: dict[str, Any], **environment: str) -> None:
        self.machine = machine
        self.folder = Path(settings["runs"]) / settings["name"]
        self.errors: list[str] = []
        self.started = time.monotonic()
        experiment = Path(settings["runs"]).parent / f"{settings['name']}.yaml"
        experiment.write_text(yaml.safe_dump(settings))
        self.process = machine.popen("python", "-m", "align", "run", experiment, **environment)
        for reader in (self._read_output, self._read_errors):
            threading.Thread(target=reader, daemon=True).start()
        self._ends = threading.Thread(target=self.process.wait, daemon=True)
        self._ends.start()

    @property
    def message(self) -> str:
        """What it wrote to standard error."""
        return "".join(self.errors)

    def until_logged(self, metric: str) -> None:
        """Wait for a metric."""
        metrics = self.folder / "metrics.jsonl"
        self._until(lambda: metrics.exists() and f'"{metric}"' in metrics.read_text())

    def until_said(self, text: str) -> None:
        """Wait for a message that contains this."""
        self._until(lambda: text in self.message)

    def end(self) -> int:
        """Wait for its end. Gives its exit status."""
        self._ends.join(timeout=END)
        assert not self._ends.is_alive(), f"it hangs: {self.message}"
        return self.process.returncode

    def actors(self) -> list[psutil.Process]:
        """The ranks and workers on the controller's machine."""
        return self.machine.processes("ray::_Rank") + self.machine.processes("ray::Worker")

    def _until(self, condition: Any) -> None:
        deadline = time.monotonic() + END
        while not condition():
            assert self.process.poll() is None, self.message
            assert time.monotonic() < deadline, f"it hangs: {self.message}"
            time.sleep(0.05)

    def _read_output(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.read()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors.append(line)


def until(condition: Any) -> bool:
    """Wait for a condition. Gives whether it became true."""
    deadline = time.monotonic() + END
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


def last_line(text: str) -> str:
    """The last line that says something."""
    return [line for line in text.splitlines() if line.strip()][-1]
