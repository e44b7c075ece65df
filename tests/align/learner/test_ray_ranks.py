"""Learner ranks in real Ray actors: their network interface, and how they fail."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest
import ray
import torch.distributed as dist

from align.config.schema import ClusterSettings
from align.learner.ray_ranks import RayRanks
from align.resources.ray_cluster import ray_cluster
from align.runtime.failures import RankLost, describe_outside_failure
from policies.device import ActorOptions, ComputeSettings
from policies.errors import ActorError, UserError


class Learner:
    """A learner of which every call fails."""

    def fail(self, cause: Exception) -> None:
        raise cause

    def interface(self) -> tuple[str, str]:
        return os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[RayRanks[Learner]]:
    with ray_cluster(ClusterSettings(), 4):
        started = RayRanks(Learner, [ActorOptions(ComputeSettings(1, deterministic=True))] * 2)
        yield started
        started.close()


def node() -> str:
    return str(ray.util.get_node_ip_address())


def test_a_mistake_of_the_user_is_reported_as_such(ranks: RayRanks[Learner]) -> None:
    with pytest.raises(UserError) as caught:
        ranks.call(Learner.fail, UserError("no such file"))
    assert type(caught.value) is UserError
    assert str(caught.value) == f"no such file (in a learner rank on node {node()})"


def test_another_exception_is_reported_by_its_class_and_text(ranks: RayRanks[Learner]) -> None:
    with pytest.raises(ActorError) as caught:
        ranks.scatter(Learner.fail, [(ZeroDivisionError("by zero"),), (ZeroDivisionError("by zero"),)])
    expected = f"ZeroDivisionError: by zero (in a learner rank on node {node()})"
    assert str(caught.value) == expected
    assert describe_outside_failure(caught.value) == expected


@pytest.mark.parametrize(
    ("cause", "what"),
    [
        (
            RuntimeError("Gloo failed: [/gloo/pair.cc:5] Read error [10.0.0.2]:5289: Connection reset by peer. GLHF!"),
            "Gloo failed: Read error [10",
        ),
        (dist.DistBackendError("NCCL error: remote process has exited"), "NCCL error: remote process has exited"),
    ],
    ids=["gloo", "NCCL"],
)
def test_a_lost_connection_between_ranks_is_a_lost_rank(cause: Exception, what: str, ranks: RayRanks[Learner]) -> None:
    with pytest.raises(RankLost) as caught:
        ranks.call(Learner.fail, cause)
    assert str(caught.value).startswith(f"a rank of the learner has lost the connection to another: {what}")
    assert "GLHF" not in str(caught.value)


def test_ranks_connect_through_the_interface_with_the_nodes_address(ranks: RayRanks[Learner]) -> None:
    for gloo, nccl in ranks.call(Learner.interface):
        assert node() in [address.address for address in psutil.net_if_addrs()[gloo]]
        assert nccl == f"={gloo}"


def build_in_the_first_rank() -> Learner:
    """The first rank takes for ever, and the second dies."""
    if dist.get_rank() == 1:
        os._exit(1)
    time.sleep(1000)
    return Learner()


def rank_processes() -> set[int]:
    every = psutil.Process().children(recursive=True)
    return {process.pid for process in every if "_Rank" in process.name()}


@pytest.mark.slow
def test_a_rank_that_works_does_not_outlive_one_that_dies_at_the_start(ranks: RayRanks[Learner]) -> None:
    before = rank_processes()
    with pytest.raises(RankLost, match=f"rank 1 of the learner has died on node {node()}: "):
        RayRanks(build_in_the_first_rank, [ActorOptions(ComputeSettings(1, deterministic=True))] * 2)
    deadline = time.monotonic() + 30
    while rank_processes() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert rank_processes() == before
