"""A cluster that asks for a token, on both of whose machines a run computes."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.resources.ray_cluster import WRONG_TOKEN
from tests.cluster.conftest import Cluster, Record
from tests.cluster.machines import PORT
from tests.cluster.runs import Run, last_line, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
WRONG = TOKEN | {"RAY_AUTH_TOKEN": "fedcba9876543210fedcba9876543210"}


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    both = Cluster(tmp_path_factory.mktemp("cluster"), tiny_model, TOKEN)
    try:
        both.start()
        yield both
    finally:
        both.end()


@pytest.mark.parametrize(
    ("environment", "scenario"),
    [({}, "no token"), ({"RAY_AUTH_MODE": "token"}, "no token, in mode token"), (WRONG, "a wrong token")],
    ids=["none", "none-in-mode-token", "wrong"],
)
def test_a_run_without_the_token_is_told_what_to_set(
    environment: dict[str, str], scenario: str, cluster: Cluster, record: Record, request: pytest.FixtureRequest
) -> None:
    settings = cluster.settings(request.node.callspec.id)
    settings["learner"]["ranks"] = 1
    since = time.monotonic()
    run = Run(cluster.first, settings, **environment)
    assert run.end() == 2
    message = f"error: cluster.address {cluster.address} cannot be joined: {WRONG_TOKEN}"
    assert last_line(run.message) == message
    assert not (run.folder / "checkpoints").exists()
    record(scenario, "refused, status 2", since, message)


def test_a_wrong_address_is_told(cluster: Cluster, record: Record) -> None:
    settings = cluster.settings("address")
    settings["cluster"]["address"] = f"{cluster.first.address}:{PORT + 1}"
    settings["learner"]["ranks"] = 1
    since = time.monotonic()
    run = Run(cluster.first, settings, **TOKEN)
    assert run.end() == 2
    message = f"error: cluster.address {settings['cluster']['address']} cannot be reached: "
    assert last_line(run.message).startswith(message)
    assert not (run.folder / "checkpoints").exists()
    record("a wrong address", "refused, status 2", since, last_line(run.message))


def test_a_run_with_the_token_finishes_on_both_machines(cluster: Cluster, record: Record) -> None:
    settings = cluster.settings("whole")
    settings["learner"] |= {"ranks": 2, "zero": 2, "strategy": "STRICT_SPREAD"}
    settings["rollouts"] |= {"workers": 1, "chunk_size": 8, "resources": {"second": 1}}
    since = time.monotonic()
    run = Run(cluster.first, settings, **TOKEN)
    for stage in ("sft", "reward_model", "policy"):
        run.until_logged(f"{stage}/loss")
        assert len(cluster.first.processes("ray::_Rank")) == 1
        assert len(cluster.second.processes("ray::_Rank")) == 1
    assert len(cluster.second.processes("ray::Worker")) == 1
    assert run.end() == 0, run.message
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert evaluation["seconds"].keys() == {"sft", "reward", "ppo"}
    assert until(lambda: not run.actors())
    record("a rank on each machine, a worker on the second; all stages", "finishes, status 0", since)
