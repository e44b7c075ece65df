"""What configs/cluster holds, as far as it can be checked without a cloud: names of fields, files and commands."""

import copy
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from align.cli import app

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "configs" / "cluster"
FILES = sorted(CLUSTER.iterdir())

JOB_FIELDS = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionStrategy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "preRunningDeadlineSeconds",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
CLUSTER_FIELDS = {
    "authOptions",
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "upgradeStrategy",
    "workerGroupSpecs",
}
HEAD_FIELDS = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_FIELDS = {
    "groupName",
    "idleTimeoutSeconds",
    "labels",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "resources",
    "scaleStrategy",
    "suspend",
    "template",
}
"""The names of fields of RayJob, `ray.io/v1`, in KubeRay's API reference."""
POD_FIELDS = {"containers", "volumes"}
CONTAINER_FIELDS = {"env", "image", "name", "resources", "volumeMounts"}
"""Those of Kubernetes' pods and containers that the file uses."""


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_rays_own_schema_accepts_the_file_for_ray_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read("ray-up.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="head_start_ray_command"):
        validate_config(prepare_config(config | {"head_start_ray_command": []}))


def test_the_ray_job_has_the_fields_of_its_custom_resource() -> None:
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB_FIELDS
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= CLUSTER_FIELDS
    assert cluster["rayVersion"] == version("ray")
    assert set(cluster["headGroupSpec"]) <= HEAD_FIELDS
    (workers,) = cluster["workerGroupSpecs"]
    assert set(workers) <= WORKER_FIELDS
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (cluster["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert set(pod) == POD_FIELDS
        (container,) = pod["containers"]
        assert set(container) == CONTAINER_FIELDS
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3


def test_what_the_image_copies_exists_and_its_versions_are_the_tested_ones() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert f"FROM rayproject/ray:{version('ray')}-py311-gpu" in lines
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = [word for word in shlex.split(line)[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line
    torch = version("torch").partition("+")[0]
    assert any(f"torch=={torch}" in line for line in lines)
    assert "has not been built" in "\n".join(lines)


@pytest.mark.parametrize("script", [path for path in FILES if path.suffix == ".sh"], ids=lambda path: path.name)
def test_bash_can_read_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


COMMAND = re.compile(r"\balign (submit|run|resume)\b(.*)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_options_of_align_in_the_file_exist(path: Path) -> None:
    commands = typer.main.get_command(app)
    for name, rest in COMMAND.findall(path.read_text()):
        known = {option for parameter in commands.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
        assert set(re.findall(r"--[a-z-]+", rest)) <= known
