"""configs/cluster/slurm.sh with real raylets, on machines of their own. SLURM itself is simulated.

`srun` is a stub that starts the step here and, through a file, on the other machine. The test sends SLURM's signal.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.machines import REPOSITORY, Machine, connect
from tests.cluster.runs import until
from tests.integration.tiny_run import make_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
printf '%s\\0' "$@" > "$STEP.part"
env -0 | grep -z ^RAY_ > "$STEP.environment"
mv "$STEP.part" "$STEP"
exec "$@"
"""


class Slurm:
    """A job of SLURM on one or two machines."""

    def __init__(self, machines: list[Machine], folder: Path) -> None:
        self.machines = machines
        self.folder = folder
        self.step = folder / "step"
        srun = folder / "bin" / "srun"
        srun.parent.mkdir(exist_ok=True)
        srun.write_text(SRUN)
        srun.chmod(0o755)
        self.environment = folder / "environment"
        (self.environment / "bin").mkdir(parents=True, exist_ok=True)
        (self.environment / "bin" / "activate").write_text(f"PATH={srun.parent}:$PATH\n")

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        """Start the script on the first machine, and its step on the others, whose output goes to NAME.log."""
        self.step.unlink(missing_ok=True)
        script = REPOSITORY / "configs/cluster/slurm.sh"
        process = self.machines[0].popen(
            "bash",
            script,
            *arguments,
            ALIGN_ENVIRONMENT=str(self.environment),
            STEP=str(self.step),
            SLURM_JOB_ID="4711",
            SLURM_JOB_NUM_NODES=str(len(self.machines)),
            SLURM_CPUS_PER_TASK="2",
        )
        for machine in self.machines[1:]:
            assert until(self.step.exists)
            line = self.step.read_text().split("\0")[:-1]
            environment = dict(
                text.split("=", 1) for text in (self.folder / "step.environment").read_text().split("\0")[:-1]
            )
            machine.popen("bash", "-c", '"$@" &> "$0"', self.folder / f"{machine.name}.log", *line, **environment)
        return process


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder that the machines share, with an experiment in it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    settings = make_settings(tiny_model, shared)
    settings["learner"] |= {"ranks": 2, "zero": 2}
    settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
    (shared / "experiment.yaml").write_text(yaml.safe_dump(settings))
    return shared


@pytest.fixture
def machines(tiny_model: Path, folder: Path) -> Iterator[list[Machine]]:
    """Two machines that share the folder, linked, without Ray."""
    both = [Machine(name, f"10.77.0.{n}", folder, (tiny_model, folder)) for n, name in ((1, "first"), (2, "second"))]
    try:
        for machine in both:
            machine.start()
        connect(*both)
        for machine, other in zip(both, reversed(both), strict=True):
            # By its default route Ray finds the address of a node; `ray symmetric-run` does not let one set it.
            machine.run("ip", "route", "add", "default", "via", other.address)
        yield both
    finally:
        for machine in reversed(both):
            machine.end()


def test_a_run_on_one_node_passes_its_exit_status_on(machines: list[Machine], folder: Path) -> None:
    process = Slurm(machines[:1], folder).start("run", folder / "experiment.yaml", "learner.ranks=1")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, output + errors
    assert "ppo" in json.loads((folder / "runs/tiny/evaluation.json").read_text())["seconds"]
    process = Slurm(machines[:1], folder).start("run", folder / "nowhere.yaml")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2, output + errors
    assert "nowhere.yaml does not exist" in errors


def test_two_nodes_stop_on_slurms_signal_with_a_checkpoint_and_resume(machines: list[Machine], folder: Path) -> None:
    slurm = Slurm(machines, folder)
    process = slurm.start("run", folder / "experiment.yaml", "ppo.steps=500", "checkpoint.every=1000")
    metrics = folder / "runs/tiny/metrics.jsonl"
    assert until(lambda: process.poll() is not None or (metrics.exists() and '"policy/loss"' in metrics.read_text()))
    assert process.poll() is None, process.communicate()
    assert len(machines[1].processes("raylet")) == 1
    script = next(each for each in machines[0].processes("bash") if "slurm.sh" in " ".join(each.cmdline()))
    os.kill(script.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, output + errors
    assert "stopped; `align resume" in errors
    (last,) = (folder / "runs/tiny/checkpoints/ppo").glob("step-*")
    steps = int(last.name.removeprefix("step-")) + 1
    for machine in machines:
        assert until(lambda machine=machine: not machine.processes("raylet"))
    process = slurm.start("resume", folder / "runs/tiny", f"ppo.steps={steps}")
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, output + errors
    assert "ppo" in json.loads((folder / "runs/tiny/evaluation.json").read_text())["seconds"]
