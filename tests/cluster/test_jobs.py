"""Runs as jobs of a cluster of two machines that asks for a token."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.machines import PORT, Machine, connect, start_ray
from tests.integration.kill_sweep import contents
from tests.integration.tiny_run import figures, make_settings

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
DASHBOARD = 8265
ADDRESS = f"http://127.0.0.1:{DASHBOARD}"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LOSS = """
import time
from pathlib import Path

from align.algorithms.losses import load_policy_loss

FOLDER = Path("{folder}")


def slow_loss(*arguments):
    if (FOLDER / "slow").exists():
        with (FOLDER / "calls").open("a") as calls:
            calls.write(".")
        if (FOLDER / "calls").stat().st_size == {slow_call}:
            (FOLDER / "calling").touch()
            while not (FOLDER / "go").exists():
                time.sleep(0.1)
    return load_policy_loss("clip")(*arguments)
"""
SLOW_CALL = 10
"""The call of the loss that takes long: the second of the third step."""


@dataclass(frozen=True)
class Client:
    """The commands of a user who works in a folder on the first machine, which both machines have."""

    machine: Machine
    folder: Path

    def popen(self, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
        command = ["env", f"--chdir={self.folder}", "python", "-m", "align", *map(str, arguments)]
        return self.machine.popen(*command, **TOKEN | {"RAY_API_SERVER_ADDRESS": ADDRESS} | environment)

    def align(self, *arguments: object, **environment: str) -> tuple[int, str, str]:
        """Run a command. Gives its exit status, standard output and standard error."""
        process = self.popen(*arguments, **environment)
        output, errors = process.communicate(timeout=600)
        return process.returncode, output, errors


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that both machines have."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def machine(tiny_model: Path, shared: Path) -> Iterator[Machine]:
    """The first of two machines with a Ray cluster that asks for a token."""
    first, second = (
        Machine(name, f"10.77.0.{number}", shared, (tiny_model, shared))
        for number, name in enumerate(("first", "second"), start=1)
    )
    try:
        first.start()
        second.start()
        connect(first, second)
        start_ray(first, "--head", "--port", PORT, "--num-cpus", 2, "--dashboard-port", DASHBOARD, **TOKEN)
        start_ray(second, "--address", f"{first.address}:{PORT}", "--num-cpus", 2, **TOKEN)
        yield first
    finally:
        second.end()
        first.end()


@pytest.fixture
def client(machine: Machine, shared: Path, request: pytest.FixtureRequest) -> Client:
    folder = shared / request.node.name[:40]
    folder.mkdir()
    return Client(machine, folder)


def write_experiment(client: Client, model: Path, name: str = "tiny", **changes: dict[str, Any]) -> None:
    """A small experiment with actors in the client's folder, its data beside it under relative paths."""
    settings = make_settings(model, client.folder) | {"name": name, "runs": "runs"}
    for key, path in settings["data"].items():
        settings["data"][key] = str(Path(path).relative_to(client.folder))
    settings["learner"] |= {"ranks": 1}
    settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
    for section, values in changes.items():
        settings[section] = settings[section] | values
    (client.folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def job_in(errors: str) -> str:
    found = re.search(r"job (\S+) submitted", errors)
    assert found, errors
    return found[1]


def test_a_submitted_run_streams_its_output_and_ends_in_the_folder_here(client: Client, tiny_model: Path) -> None:
    write_experiment(client, tiny_model)
    process = client.popen("submit", "tiny.yaml")
    assert process.stdout is not None
    lines = {}
    for line in process.stdout:
        lines[line] = time.monotonic()
    ended = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, "".join(lines) + errors
    plan = next(line for line in lines if line.startswith("plan of tiny"))
    assert ended - lines[plan] > 2  # it was not kept back until the end
    assert "on 2 nodes" in errors
    evaluation = json.loads((client.folder / "runs/tiny/evaluation.json").read_text())
    assert evaluation["seconds"].keys() == {"sft", "reward", "ppo"}
    assert yaml.safe_load((client.folder / "runs/tiny/config.yaml").read_text())["cluster"]["address"] is None
    status, output, _ = client.align("jobs", "list")
    assert status == 0
    assert re.search(rf"{job_in(errors)}\s+succeeded .* {client.folder}/runs/tiny", output)


def test_mistakes_are_told_at_once_or_by_the_job_with_its_exit_status(client: Client, tiny_model: Path) -> None:
    write_experiment(client, tiny_model)
    since = time.monotonic()
    status, _, errors = client.align("submit", "tiny.yaml", "ppo.step=3")
    assert (status, errors) == (2, "error: override 'ppo.step=3': ppo.step: unknown key; did you mean steps?\n")
    assert time.monotonic() - since < 60
    status, output, errors = client.align("submit", "tiny.yaml", "data.prompts.path=nowhere.jsonl")
    assert status == 2
    assert "nowhere.jsonl" in output.splitlines()[-1]
    status, _, errors = client.align("submit", "tiny.yaml", "--python", "no-python")
    assert status == 127
    assert "the cluster has no no-python: set --python to the path of Python there" in errors


def test_without_the_token_and_with_a_wrong_address_what_to_set_is_said(client: Client) -> None:
    status, _, errors = client.align("jobs", "list", RAY_AUTH_TOKEN="0" * 32)
    assert status == 2
    assert "the token of this process is missing or wrong" in errors
    status, _, errors = client.align("jobs", "list", "--address", "http://127.0.0.1:1")
    assert status == 2
    assert "--address http://127.0.0.1:1" in errors
    assert "Traceback" not in errors


def test_a_job_that_is_stopped_in_a_long_update_and_resumed_ends_as_one_that_is_not(
    client: Client, tiny_model: Path
) -> None:
    (client.folder / "losses.py").write_text(LOSS.format(folder=client.folder, slow_call=SLOW_CALL))
    changes: dict[str, dict[str, Any]] = {
        "ppo": {"steps": 4, "policy_loss": "losses.py:slow_loss"},
        "checkpoint": {"every": 100},
        "evaluation": {"every": 0},
    }
    for name in ("whole", "hurt"):
        write_experiment(client, tiny_model, name, **changes)
    status, output, errors = client.align("submit", "whole.yaml")
    assert status == 0, output + errors
    (client.folder / "slow").touch()
    process = client.popen("submit", "hurt.yaml")
    assert process.stderr is not None
    job = job_in(process.stderr.readline() + process.stderr.readline())
    while not (client.folder / "calling").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    stop = client.popen("jobs", "stop", job)
    assert process.stdout is not None
    output = ""
    while "stopping at the end of this step" not in output:
        output += process.stdout.readline()
    time.sleep(20)  # Ray kills after 3 seconds unless it is told otherwise
    (client.folder / "go").touch()
    assert stop.wait(timeout=300) == 0
    rest, _ = process.communicate(timeout=60)
    output += rest
    assert process.returncode == 130
    assert "`align resume" in output
    assert "Traceback" not in output
    hurt = client.folder / "runs/hurt"
    assert [path.name for path in (hurt / "checkpoints/ppo").glob("step-*")] == ["step-3"]
    (client.folder / "slow").unlink()
    status, output, errors = client.align("jobs", "resume", job)
    assert status == 0, output + errors
    whole = client.folder / "runs/whole"
    assert figures(hurt) == figures(whole)
    for name in ("samples.jsonl", "policy/adapter_model.safetensors"):
        assert (hurt / name).read_bytes() == (whole / name).read_bytes()
    assert contents(hurt / "checkpoints/ppo/step-4") == contents(whole / "checkpoints/ppo/step-4")


def test_runs_that_would_land_in_rays_cache_are_refused_for_jobs_of_ray_itself(
    client: Client, tiny_model: Path
) -> None:
    write_experiment(client, tiny_model)
    line = ["ray", "job", "submit", "--working-dir", client.folder, "--", "python", "-m", "align", "run", "tiny.yaml"]
    process = client.machine.popen(*line, **TOKEN, RAY_API_SERVER_ADDRESS=ADDRESS)
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "would be in the folder in which Ray keeps a job's working directory" in output + errors
    assert "exit code 2" in output + errors
