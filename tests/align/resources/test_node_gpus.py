"""The memory of a cluster's GPUs: real Ray nodes with logical GPUs, each with a simulated `nvidia-smi` on its PATH."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

import align
from align.config.schema import ClusterSettings, Experiment
from align.resources.node_gpus import MEBIBYTE, GpuMemory, smallest_gpu
from align.resources.ray_cluster import RAY_ENVIRONMENT, ray_cluster
from tests.integration.tiny_run import make_settings

HEAD = "head"
FIRST, SECOND = "127.0.0.2", "127.0.0.3"
"""The addresses of the nodes with GPUs, all of them on this machine."""
LARGE, SMALL = 81559, 24564
"""MiB of an H100 and of an RTX 4090."""


class Nodes:
    """A cluster of a head without GPUs and of two nodes with two GPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster()
        for address, gpus in ((HEAD, 0), (FIRST, 2), (SECOND, 2)):
            (folder / address).mkdir()
            with pytest.MonkeyPatch.context() as environment:
                environment.delenv("CUDA_VISIBLE_DEVICES")  # empty in tests, and Ray then refuses `num_gpus`
                environment.setenv("PATH", f"{folder / address}{os.pathsep}{os.environ['PATH']}")
                for name, value in RAY_ENVIRONMENT.items():
                    environment.setenv(name, value)
                place = {"node_ip_address": address} if gpus else {}
                self.cluster.add_node(num_cpus=2, num_gpus=gpus, include_dashboard=False, **place)

    def smallest(self, *replies: str) -> GpuMemory | None:
        """The smallest GPU where this is what `nvidia-smi` does on the nodes with GPUs."""
        for address, script in zip((HEAD, FIRST, SECOND), ("echo 1", *replies), strict=True):
            command = self.folder / address / "nvidia-smi"
            command.write_text(f"#!/bin/sh\n{script}\n")
            command.chmod(0o755)
        with self.joined():
            return smallest_gpu()

    def joined(self) -> Any:
        """Join the cluster within a block."""
        return ray_cluster(ClusterSettings(address=self.cluster.address), 1)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    started = Nodes(tmp_path_factory.mktemp("nodes"))
    yield started
    started.cluster.shutdown()


@pytest.mark.slow
def test_the_smallest_gpu_is_named_with_its_node_where_nodes_differ(nodes: Nodes) -> None:
    expected = GpuMemory(SMALL * MEBIBYTE, SECOND)
    assert nodes.smallest(f"echo {LARGE}; echo {LARGE}", f"echo {LARGE}; echo {SMALL}") == expected
    assert nodes.smallest(f"echo {SMALL}", f"echo {SMALL}") == GpuMemory(SMALL * MEBIBYTE)


@pytest.mark.parametrize(
    "broken",
    ["echo 'NVIDIA-SMI has failed'; exit 9", "echo '[N/A]'", "true", "rm $0; exec $0", f"echo {LARGE}; exit 9"],
)
def test_a_node_that_cannot_tell_is_left_out(nodes: Nodes, broken: str) -> None:
    assert nodes.smallest(broken, f"echo {LARGE}") == GpuMemory(LARGE * MEBIBYTE)
    assert nodes.smallest(broken, broken) is None


def test_a_node_that_takes_too_long_is_left_out(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.resources.node_gpus.QUERY_SECONDS", 1.0)
    assert nodes.smallest("sleep 20", f"echo {LARGE}") == GpuMemory(LARGE * MEBIBYTE)


def test_nodes_tell_while_all_of_their_gpus_are_taken(nodes: Nodes) -> None:
    with nodes.joined():
        group = placement_group([{"CPU": 2, "GPU": 2}] * 2)
        ray.get(group.ready(), timeout=60)
        assert smallest_gpu() is not None
        remove_placement_group(group)


@pytest.fixture
def experiment(nodes: Nodes, tiny_model: Path, tmp_path: Path) -> Experiment:
    """A rank and a worker, each on a GPU of the cluster."""
    nodes.smallest(f"echo {LARGE}", f"echo {SMALL}")
    settings = make_settings(tiny_model, tmp_path)
    settings["cluster"]["address"] = nodes.cluster.address
    settings["learner"] |= {"ranks": 1}
    settings["rollouts"] |= {"workers": 1}
    settings["model"]["dtype"] = "float32"
    return Experiment.model_validate(settings)


def test_the_plan_compares_with_the_smallest_gpu_of_the_cluster(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster is joined once."""
    addresses = []
    join = ray.init

    def note(address: str, **options: Any) -> Any:
        addresses.append(address)
        return join(address=address, **options)

    monkeypatch.setattr(ray, "init", note)
    lines = dict(align.plan(experiment))
    assert lines["placement"].startswith("1 learner rank with 1 CPU and 1 GPU (PACK); 1 rollout worker with 1 CPU and")
    assert lines["GPU, sft: learner"].endswith(f" of 25.8 GB, the smallest GPU, on node {SECOND}")
    assert "activations, 524,288 tokens per microbatch" in lines["memory, sft: learner"]
    assert addresses == [experiment.cluster.address]
    assert not ray.is_initialized()


def test_actors_without_gpus_are_not_compared_with_those_of_the_cluster(experiment: Experiment) -> None:
    sections = {
        "learner": experiment.learner.model_copy(update={"gpus": 0}),
        "rollouts": experiment.rollouts.model_copy(update={"gpus": 0}),
    }
    lines = dict(align.plan(experiment.model_copy(update=sections)))
    assert not any(name.startswith("GPU") for name in lines)
