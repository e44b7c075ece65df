"""Two machines with Ray on them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.machines import PORT, Machine, connect, start_ray, why_no_machines
from tests.integration.tiny_run import make_settings

CPUS = 4
Record = Callable[..., None]


@dataclass
class Cluster:
    """Two machines, the first of which has the head.

    Attributes:
        work: The working folder, which the second does not share.
        model: The model's folder, which both share.
        environment: Environment variables of Ray and of the runs.
        harmed: Whether a test has harmed the second machine.
    """

    work: Path
    model: Path
    environment: dict[str, str] = field(default_factory=dict)
    harmed: bool = False

    def __post_init__(self) -> None:
        self.first = Machine("first", "10.77.0.1", self.work, (self.model, self.work))
        self.second = Machine("second", "10.77.0.2", self.work, (self.model,))

    @property
    def address(self) -> str:
        return f"{self.first.address}:{PORT}"

    def start(self) -> None:
        self.first.start()
        head = ("--head", "--port", PORT, "--include-dashboard", "false")
        start_ray(self.first, *head, *_resources("first"), **self.environment)
        self.start_second()
        self.harmed = False

    def start_second(self) -> None:
        """Start the second machine, instead of an earlier one."""
        self.second.end()
        self.second.start()
        connect(self.first, self.second)
        start_ray(self.second, "--address", self.address, *_resources("second"), **self.environment)

    def end(self) -> None:
        self.second.end()
        self.first.end()

    def settings(self, name: str, stage: str | None = None) -> dict[str, Any]:
        """A small experiment, of one stage only where it is given."""
        folder = self.work / name
        folder.mkdir()
        settings = make_settings(self.model, folder) | {"name": name}
        settings["cluster"] |= {"address": self.address, "wait": 30}
        if stage:
            settings["stages"] = [stage]
        for supervised in ("sft", "reward"):
            settings[supervised] |= {"batch_size": 2, "epochs": 4} if stage else {}
        return settings


def _resources(name: str) -> tuple[object, ...]:
    return ("--num-cpus", CPUS, "--resources", f'{{"{name}": {CPUS}}}')


@pytest.fixture(scope="session", autouse=True)
def _machines_can_be_made() -> None:
    if reason := why_no_machines():
        pytest.skip(f"no machines can be made of namespaces here: {reason}")


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two machines whose Ray nodes each have CPUs and a resource of the machine's name."""
    both = Cluster(tmp_path_factory.mktemp("cluster"), tiny_model)
    try:
        both.start()
        yield both
    finally:
        both.end()


@pytest.fixture
def whole(cluster: Cluster) -> Iterator[Cluster]:
    """The machines, both of which are up; the test may harm the second."""
    if cluster.harmed:
        cluster.start_second()
    yield cluster
    cluster.harmed = True


@pytest.fixture
def record(record_property: Callable[[str, object], None]) -> Record:
    """Note what has come of a scenario, and after how many seconds, in the file of `pytest --junitxml`."""

    def note(scenario: str, outcome: str, since: float, message: str = "") -> None:
        record_property("scenario", scenario)
        record_property("outcome", outcome)
        record_property("seconds", round(time.monotonic() - since))
        record_property("message", message)

    return note
