"""Runs that lose the head of their cluster."""

import time

import pytest

from tests.cluster.conftest import Cluster, Record
from tests.cluster.runs import Run, last_line, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def assert_ended_for_the_head(run: Run, cluster: Cluster) -> None:
    assert run.end() == 1, run.message
    said = [line for line in run.message.splitlines() if line and not line.startswith("sft ")]
    assert said == [
        f"error: cluster.address {cluster.address}: the head of the cluster, {cluster.address}, accepts no "
        f"connections any more; `align resume {run.folder}` resumes from the last checkpoint"
    ]
    assert until(lambda: not run.actors())
    assert not run.machine.processes("align")


def test_the_processes_of_the_head_are_killed(cluster: Cluster, record: Record) -> None:
    settings = cluster.settings("killed", "sft")
    settings["learner"] |= {"ranks": 2, "strategy": "STRICT_SPREAD"}
    run = Run(cluster.first, settings)
    run.until_logged("sft/loss")
    for process in cluster.first.processes("gcs_server") + cluster.first.processes("raylet"):
        process.kill()
    since = time.monotonic()
    assert_ended_for_the_head(run, cluster)
    record("the head's processes killed", "ends, status 1", since, last_line(run.message))


def test_the_link_to_the_head_is_down(cluster: Cluster, record: Record) -> None:
    cluster.first.end()
    cluster.second.shared = (cluster.model, cluster.work)
    cluster.start()
    settings = cluster.settings("cut-off", "sft")
    settings["learner"] |= {"ranks": 2, "strategy": "STRICT_SPREAD"}
    run = Run(cluster.second, settings)
    run.until_logged("sft/loss")
    cluster.first.set_link("down")
    since = time.monotonic()
    assert_ended_for_the_head(run, cluster)
    record("the link between the controller and the head down", "ends, status 1", since, last_line(run.message))
