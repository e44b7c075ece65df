"""Whether the nodes of a cluster have the model that a run's actors read."""

import os
import re

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.config.schema import Experiment
from policies.errors import UserError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""`organisation/name`; not a path that begins with `/` or `.`."""


def check_model_on_nodes(experiment: Experiment, gpus: bool) -> None:
    """Check that every node on which actors may run has the folder of the base model. Ray must be initialized.

    Args:
        experiment: The settings.
        gpus: Whether the actors have GPUs.

    Raises:
        UserError: A node lacks it.
    """
    if not is_hub_name(experiment.model.path):
        check_folder_on_nodes("model.path", experiment.model.path, gpus)


def is_hub_name(name: str) -> bool:
    """Whether this names a model on the hub: it has the form `organisation/name`, and there is no such folder here."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def check_folder_on_nodes(key: str, folder: str, gpus: bool) -> None:
    """Look for a folder on every node that has CPUs and, where actors reserve them, GPUs.

    Args:
        key: The setting that names the folder.
        folder: The folder.
        gpus: Whether actors reserve GPUs.

    Raises:
        UserError: A node lacks it.
    """
    found = {}
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"] and resources.get("CPU") and (resources.get("GPU") or not gpus):
            found[node["NodeManagerAddress"]] = _is_folder_on(node["NodeID"], folder)
    for address, reference in found.items():
        if not ray.get(reference):
            raise UserError(
                f"{key}: no folder {folder} on node {address}: ranks and workers read it there; put it there under "
                "the same path, or on a file system that all nodes share"
            )


def _is_folder_on(node: str, folder: str) -> "ray.ObjectRef[bool]":
    """Look for a folder on one node."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(os.path.isdir).options(num_cpus=0, scheduling_strategy=strategy).remote(folder)
