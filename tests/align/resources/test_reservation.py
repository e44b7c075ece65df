"""Places reserved in real Ray clusters with logical GPUs, of which there are none: probe actors tell what they got."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import NodeDiedError

from align.config.schema import Experiment
from align.learner.ray_ranks import RayRanks
from align.resources import reservation as module
from align.resources.actors import RANK, WORKER, most_actors
from align.resources.placement import Node, place
from align.resources.ray_cluster import RAY_ENVIRONMENT
from align.resources.reservation import Reservation, reserve
from policies.device import ActorOptions
from policies.errors import UserError

HIDDEN = "CUDA_VISIBLE_DEVICES"
"""tests/conftest.py empties it, and Ray then refuses `num_gpus`."""

OTHER_RUN = """
import sys, time, ray
from align.config.schema import Experiment
from align.resources.actors import most_actors
from align.resources.reservation import reserve
ray.init(address=sys.argv[1], log_to_driver=False)
settings = Experiment.model_validate_json(sys.argv[2])
reserve(settings, most_actors(settings, settings.stages))
print("reserved", flush=True)
sys.stdin.read()
"""
"""A run of its own that holds a reservation until its standard input is closed."""


def experiment(ranks: int, workers: int, wait: float = 30.0, **sections: Any) -> Experiment:
    """Settings of a run on a cluster that this process has already joined."""
    settings: dict[str, Any] = {"name": "x", "model": {"path": "x"}, "cluster": {"address": "auto", "wait": wait}}
    settings["learner"] = {"ranks": ranks} | sections.pop("learner", {})
    settings["rollouts"] = {"workers": workers, "chunk_size": 8} | sections.pop("rollouts", {})
    return Experiment.model_validate(settings | sections)


@contextmanager
def reserved(settings: Experiment) -> Iterator[Reservation]:
    reservation = reserve(settings, most_actors(settings, settings.stages))
    yield reservation
    reservation.release()  # and with the groups their actors
    for name in ("CPU", "GPU"):
        while ray.available_resources().get(name) != ray.cluster_resources().get(name):
            time.sleep(0.05)


def started(actors: list[ActorOptions]) -> list[Any]:
    """Start actors that tell what Ray has given them."""

    class Probe:
        """It is defined here so that its process need not import this module, and torch with it."""

        def gpus(self) -> list[str]:
            return list(ray.get_runtime_context().get_accelerator_ids()["GPU"])

        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    return [ray.remote(Probe).options(**actor.options).remote() for actor in actors]


def gpus_of(probes: list[Any]) -> list[list[str]]:
    return list(ray.get([probe.gpus.remote() for probe in probes]))


@contextmanager
def cluster_of(*nodes: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster of several nodes on this machine, which this process joins; the first is the head."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(HIDDEN)
        for name, value in RAY_ENVIRONMENT.items():
            environment.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **nodes[0]})
        for node in nodes[1:]:
            cluster.add_node(**node)
        cluster.connect()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without GPUs, and two nodes with four each."""
    node = {"num_cpus": 8, "num_gpus": 4}
    head = {"num_cpus": 2, "num_gpus": 0}
    with cluster_of(head, node | {"labels": {"zone": "a"}}, node | {"resources": {"fast_disk": 1}}) as started:
        yield started


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 3), (4, 4)])
def test_each_rank_and_each_worker_has_a_gpu_of_its_own(cluster: Cluster, ranks: int, workers: int) -> None:
    with reserved(experiment(ranks, workers)) as reservation:
        probes = started(reservation.actors(RANK)) + started(reservation.actors(WORKER))
        nodes = ray.get([probe.node.remote() for probe in probes])
        gpus = gpus_of(probes)
    assert [len(ids) for ids in gpus] == [1] * (ranks + workers)
    places = zip(nodes, [ids[0] for ids in gpus], strict=True)
    assert len(set(places)) == ranks + workers
    assert len(set(nodes[:ranks])) == 1  # packed
    head = ray.get_runtime_context().get_node_id()
    assert head not in nodes


def test_workers_on_the_ranks_gpus_have_theirs(cluster: Cluster) -> None:
    with reserved(experiment(2, 3, rollouts={"gpus": "shared"})) as reservation:
        ranks = started(reservation.actors(RANK))
        workers = started(reservation.actors(WORKER))
        of_ranks, of_workers = gpus_of(ranks), gpus_of(workers)
        assert len({ids[0] for ids in of_ranks}) == 2
        assert of_workers == [of_ranks[0], of_ranks[1], of_ranks[0]]


def test_labels_and_custom_resources_choose_the_node(cluster: Cluster) -> None:
    settings = experiment(1, 1, learner={"label_selector": {"zone": "a"}}, rollouts={"resources": {"fast_disk": 0.5}})
    by_id = {node["NodeID"]: node for node in ray.nodes()}
    with reserved(settings) as reservation:
        rank, worker = started(reservation.actors(RANK)) + started(reservation.actors(WORKER))
        assert by_id[ray.get(rank.node.remote())]["Labels"]["zone"] == "a"
        assert "fast_disk" in by_id[ray.get(worker.node.remote())]["Resources"]


def test_threads_are_a_share_of_the_actors_own_node(cluster: Cluster) -> None:
    settings = experiment(2, 4, learner={"gpus": 0}, rollouts={"gpus": 0, "strategy": "STRICT_PACK"})
    with reserved(settings) as reservation:
        assert [actor.compute.processes for actor in reservation.actors(WORKER)] == [4] * 4
        assert [actor.compute.gpu for actor in reservation.actors(RANK)] == [False] * 2
        assert [actor.compute.processes for actor in reservation.actors(RANK, 1)] == [1]
    with reserved(experiment(2, 0, stages=["sft"], learner={"gpus": 0, "cpus": 3})) as reservation:
        assert [actor.compute.threads for actor in reservation.actors(RANK)] == [3, 3]


def test_too_few_gpus_are_told_within_the_wait_with_what_there_is(cluster: Cluster) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        reserve(experiment(9, 1, wait=1.0), {RANK: 9, WORKER: 1})
    assert time.monotonic() - begun < 20  # not for ever
    message = str(caught.value)
    assert "for 1 s the cluster has had no room for 9 learner ranks, each with 1 CPU and 1 GPU (PACK)" in message
    assert "(8 CPUs and 4 GPUs)" in message
    assert "of which 18 CPUs and 8 GPUs are free" in message  # nothing is held any more
    assert "raise cluster.wait" in message


def test_a_rank_that_was_given_a_gpu_and_finds_none_refuses(cluster: Cluster) -> None:
    with reserved(experiment(1, 0, stages=["sft"])) as reservation, pytest.raises(UserError) as caught:
        RayRanks(dict, reservation.actors(RANK))  # type: ignore[type-var]
    message = str(caught.value)
    assert message.startswith("Ray has given this process a GPU (CUDA_VISIBLE_DEVICES is '")
    assert "finds none (it is a build for CPUs)" in message
    assert "(in a learner rank on node" in message


def test_the_user_is_told_what_a_run_waits_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    with reserved(experiment(8, 0, stages=["sft"])), pytest.raises(UserError):
        reserve(experiment(1, 0, wait=1.0, stages=["sft"]), {RANK: 1})
    assert "waiting up to 1 s (cluster.wait) for 1 learner rank with 1 CPU and 1 GPU" in caplog.messages[0]


def test_a_run_that_waits_for_its_turn_ends_too(cluster: Cluster) -> None:
    expected = "another run on this cluster has been waiting for room"
    with module._lock(time.monotonic()), pytest.raises(UserError, match=expected):
        reserve(experiment(1, 0, wait=1.0, stages=["sft"]), {RANK: 1})
    with reserved(experiment(1, 0, stages=["sft"])):
        pass


def run_beside(cluster: Cluster, settings: Experiment) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", OTHER_RUN, cluster.address, settings.model_dump_json()]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_runs_never_hold_half_of_what_each_needs(cluster: Cluster) -> None:
    """Each needs six of eight GPUs, three for its ranks: one gets all, and the other when the first has ended."""
    settings = experiment(3, 3, wait=120.0)
    runs = [run_beside(cluster, settings) for _ in range(2)]
    told: list[int] = []
    readers = []
    for number, run in enumerate(runs):
        readers.append(threading.Thread(target=report, args=(number, run, told)))
        readers[-1].start()
    while not told:
        time.sleep(0.1)
    time.sleep(1.0)
    assert len(told) == 1
    first, second = told[0], 1 - told[0]
    runs[first].communicate()
    readers[second].join()
    assert told == [first, second]
    runs[second].communicate()


def report(number: int, run: "subprocess.Popen[str]", told: list[int]) -> None:
    """Note when a run says that it has its reservation."""
    assert run.stdout is not None
    if run.stdout.readline() == "reserved\n":
        told.append(number)


@pytest.mark.slow
def test_the_bundles_of_a_lost_node_move_to_another_where_one_has_room(cluster: Cluster) -> None:
    """The last test of this module: it takes the cluster apart."""
    settings = experiment(2, 0, wait=5.0, stages=["sft"], learner={"strategy": "STRICT_SPREAD"})
    reservation = reserve(settings, {RANK: 2})
    before = node_of(reservation)
    added = cluster.add_node(num_cpus=8, num_gpus=4)
    remove(cluster, before)
    assert node_of(reservation) == added.node_id
    remove(cluster, added.node_id)
    with pytest.raises(UserError, match="for 5 s the cluster has had no room for 2 learner ranks"):
        reservation.actors(RANK)


def node_of(reservation: Reservation) -> str:
    """The node on which an actor of the first rank starts."""
    (probe,) = started(reservation.actors(RANK, 1))
    node = str(ray.get(probe.node.remote()))
    ray.kill(probe)
    return node


def remove(cluster: Cluster, node_id: str) -> None:
    """Kill a node, and wait until the cluster knows."""
    (node,) = [each for each in cluster.worker_nodes if each.node_id == node_id]
    cluster.remove_node(node, allow_graceful=False)
    while any(each["Alive"] for each in ray.nodes() if each["NodeID"] == node_id):
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([], "it has no node that is alive"),
        ([Node("10.0.0.1", {})], "it has 1 node: 10.0.0.1 (nothing), of which no CPUs are free"),
    ],
)
def test_a_cluster_without_nodes_or_cpus_can_be_described(
    nodes: list[Node], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cluster_nodes", lambda: nodes)
    monkeypatch.setattr(ray, "available_resources", dict)
    assert module._cluster_in_words() == words


def test_nothing_is_waited_for_where_the_only_node_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the groups is simulated; tests/integration/test_kills.py kills a node."""
    monkeypatch.setattr(module, "placement_group_table", lambda group: {"state": "RESCHEDULING"})
    monkeypatch.setattr(module, "cluster_nodes", list)
    here = experiment(1, 0, cluster={"wait": 600})
    with pytest.raises(NodeDiedError, match="its only node, on this machine, has died"):
        Reservation(here, place(here, {RANK: 1}, 0), [object()]).await_room()
