"""What `model.dtype: auto` stands for is settled by the devices of the processes that compute.

Devices other than this machine's CPU are simulated: each test replaces what a process finds out about its device. In
Ray's actors, `sitecustomize.py` does so, which Python imports at its start.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

import align
from align.config.schema import Experiment
from align.resources import dtype as module
from align.resources.dtype import settle_dtype
from align.resources.plan import describe_placement
from align.resources.ray_cluster import RAY_ENVIRONMENT
from align.runs.folder import find_run
from align.stages.launch import Planned, new_run, planned_stages, resumed_run
from align.stages.pipeline import load_datasets
from policies.device import Device
from policies.errors import UserError
from tests.integration.tiny_run import make_settings

SITE = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "policies.device":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.describe_device = lambda: module.Device("NVIDIA H100", "bfloat16")
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
"""A sitecustomize.py after which a process finds a GPU that multiplies in bfloat16."""

GPU = Device("NVIDIA H100", "bfloat16")
CPU = Device("CPU", "float32")


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    return make_settings(tiny_model, tmp_path) | {"model": {"path": str(tiny_model)}}


@pytest.fixture
def only_ppo(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run whose only stage is PPO, in a rollout worker and a learner rank."""
    settings |= {"stages": ["ppo"], "reward": {"terms": {"length": {"kind": "length", "max_tokens": 4}}}}
    settings["rollouts"]["workers"] = 1
    settings["learner"]["ranks"] = 1
    return settings


def validate(settings: dict[str, Any]) -> Experiment:
    return Experiment.model_validate(settings)


def simulate(found: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process find another device than it has."""
    monkeypatch.setattr(module, "describe_device", lambda: found)


def in_cluster(device_of: dict[str, Device], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the actors of a cluster that is not there report these devices."""

    def devices(experiment: Experiment, actors: dict[str, int]) -> module.Devices:
        return {(f"the {kind}s", device_of[kind]): None for kind in actors}

    monkeypatch.setattr(module, "_devices_of_actors", devices)


@pytest.mark.parametrize("found", [GPU, CPU])
def test_a_run_in_one_process_computes_in_what_suits_its_device(
    settings: dict[str, Any], found: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(found, monkeypatch)
    settled = settle_dtype(validate(settings))
    assert settled.experiment.model.dtype == found.fast_dtype
    assert settled.text == f"{found.fast_dtype}, which suits {found.name} of the controller"


def test_a_dtype_that_is_set_is_kept_on_any_device(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(GPU, monkeypatch)
    settings["model"]["dtype"] = "float32"
    settled = settle_dtype(validate(settings))
    assert (settled.experiment.model.dtype, settled.text) == ("float32", "float32, as set")


def test_weights_that_are_trained_themselves_are_float32(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(GPU, monkeypatch)
    settled = settle_dtype(validate(settings | {"policy": {"method": "full"}}))
    assert settled.experiment.model.dtype == "float32"
    assert settled.text == "float32, because full trains the weights themselves"


def test_actors_alone_settle_the_dtype_of_what_they_alone_compute(
    only_ppo: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(CPU, monkeypatch)
    in_cluster({"rollout worker": GPU, "learner rank": GPU}, monkeypatch)
    only_ppo["cluster"]["address"] = "10.0.0.1:6379"
    settled = settle_dtype(validate(only_ppo))
    assert settled.experiment.model.dtype == "bfloat16"
    assert settled.text == "bfloat16, which suits NVIDIA H100 of the rollout workers and the learner ranks"


@pytest.mark.parametrize("key", ["rollouts", "learner"])
def test_a_controller_that_computes_part_of_ppo_must_agree(
    only_ppo: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(CPU, monkeypatch)
    in_cluster({"rollout worker": GPU, "learner rank": GPU}, monkeypatch)
    only_ppo["cluster"]["address"] = "10.0.0.1:6379"
    only_ppo[key][{"rollouts": "workers", "learner": "ranks"}[key]] = 0
    actors = "learner ranks" if key == "rollouts" else "rollout workers"
    expected = f"the controller in float32 .CPU. and the {actors} in bfloat16 .NVIDIA H100. compute: set model.dtype"
    with pytest.raises(UserError, match=expected):
        settle_dtype(validate(only_ppo))


def test_workers_and_ranks_must_agree(only_ppo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_cluster({"rollout worker": CPU, "learner rank": GPU}, monkeypatch)
    only_ppo["cluster"]["address"] = "10.0.0.1:6379"
    with pytest.raises(UserError, match=r"the rollout workers in float32 \(CPU\) and the learner ranks in bfloat16"):
        settle_dtype(validate(only_ppo))


@pytest.mark.parametrize(
    ("stages", "changes", "computes"),
    [
        (["sft", "ppo"], {}, False),
        (["sft", "ppo"], {"sft": {"ranks": 0}}, True),
        (["ppo"], {}, False),
        (["ppo"], {"reward": {"classifier": "x", "normalise": 8}}, True),
        (["ppo"], {"reward": {"classifier": "x", "normalise": 0}}, False),
        (["reward", "ppo"], {"reward": {"terms": {"model": {"kind": "model"}}}}, True),
    ],
)
def test_the_controller_computes_what_it_trains_or_normalises(
    only_ppo: dict[str, Any],
    stages: list[str],
    changes: dict[str, Any],
    computes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate(CPU, monkeypatch)
    in_cluster({"rollout worker": CPU, "learner rank": CPU}, monkeypatch)
    only_ppo["cluster"]["address"] = "10.0.0.1:6379"
    settings = only_ppo | {"stages": stages} | changes
    assert ("the controller" in settle_dtype(validate(settings)).text) == computes


def plan(settings: dict[str, Any]) -> Planned:
    experiment = validate(settings)
    return planned_stages(experiment, load_datasets(experiment))


def test_a_run_records_its_dtype_and_keeps_it_on_other_devices(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(GPU, monkeypatch)
    experiment = validate(settings)
    with new_run(experiment) as launch:
        assert launch.experiment.model.dtype == "bfloat16"
        launch.folder.sft.mkdir()  # as if the stage were done
    assert find_run(str(launch.folder.path))[1].model.dtype == "bfloat16"

    simulate(CPU, monkeypatch)
    kept = "bfloat16, in which the run was started"
    assert plan(settings).dtype == kept
    assert plan(settings).note is None
    for overrides in ([], ["model.dtype=auto"]):
        with resumed_run(str(launch.folder.path), overrides) as resumed:
            assert (resumed.experiment.model.dtype, resumed.dtype) == ("bfloat16", kept)
    other = resumed_run(str(launch.folder.path), ["model.dtype=float32"])
    with pytest.raises(UserError, match=r"was started with model\.dtype 'bfloat16', and it is 'float32' now"), other:
        pass
    with new_run(experiment, ["reward", "ppo"]) as continued:
        assert continued.experiment.model.dtype == "bfloat16"
    with new_run(experiment) as replaced:
        assert replaced.experiment.model.dtype == "float32"


def test_the_plan_says_the_dtype_and_what_has_settled_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(GPU, monkeypatch)
    lines = dict(align.plan(validate(settings)))
    assert lines["dtype"] == "bfloat16, which suits NVIDIA H100 of the controller"
    float32 = dict(align.plan(validate(settings | {"model": {"path": settings["model"]["path"], "dtype": "float32"}})))
    assert float32["dtype"] == "float32, as set"
    assert float32["base model"] != lines["base model"]  # twice the bytes


@pytest.fixture
def gpu_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Ray cluster whose actors find a GPU."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(site))
        for name, value in RAY_ENVIRONMENT.items():  # or its workers would starve beside busy processes
            environment.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_the_actors_of_a_cluster_settle_the_dtype(only_ppo: dict[str, Any], gpu_cluster: str) -> None:
    only_ppo["cluster"]["address"] = gpu_cluster
    with new_run(validate(only_ppo)) as launch:
        assert launch.dtype == "bfloat16, which suits NVIDIA H100 of the rollout workers and the learner ranks"
    only_ppo |= {"stages": ["sft", "ppo"], "sft": {"ranks": 0}}
    with pytest.raises(UserError, match=r"the controller in float32 \(CPU\), the rollout workers in bfloat16 "):
        settle_dtype(validate(only_ppo))


def test_actors_that_the_cluster_has_no_room_for_are_told(only_ppo: dict[str, Any], gpu_cluster: str) -> None:
    only_ppo["cluster"] |= {"address": gpu_cluster, "wait": 1.0}
    only_ppo["learner"] |= {"ranks": 2, "gpus": 1}
    expected = "for 1 s the cluster has had no room for 2 learner ranks, each with 1 CPU and 1 GPU"
    with pytest.raises(UserError, match=expected):
        settle_dtype(validate(only_ppo))


def test_the_plan_compares_the_placement_with_the_cluster(only_ppo: dict[str, Any], gpu_cluster: str) -> None:
    only_ppo["cluster"]["address"] = gpu_cluster
    actors = "learner rank with 1 CPU (PACK); 1 rollout worker with 1 CPU (SPREAD)"
    host = gpu_cluster.rpartition(":")[0]
    assert describe_placement(validate(only_ppo), ["ppo"]) == f"1 {actors}; on 1 node: {host} (4 CPUs)"
    only_ppo["learner"]["cpus"] = 4
    placement = describe_placement(validate(only_ppo), ["ppo"])
    assert placement.endswith(f"; they do not fit on 1 node: {host} (4 CPUs), and cluster.wait is 300 s")


def test_an_address_without_a_cluster_is_told(only_ppo: dict[str, Any]) -> None:
    only_ppo["cluster"]["address"] = "127.0.0.1:1"
    with pytest.raises(UserError, match=r"cluster\.address 127\.0\.0\.1:1 cannot be reached: .*refused"):
        settle_dtype(validate(only_ppo))
