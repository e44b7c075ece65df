"""Whether the nodes of a cluster have the files that a run's actors read.

The controller reads everything else, such as data, adapters, reward models and the functions that score.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.config.schema import Experiment
from align.resources.actors import RANK, WORKER
from align.runs.fingerprint import user_functions
from policies.errors import UserError
from policies.text.chat_templates import BUILT_IN

HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
"""`name` or `organisation/name`; not a path that begins with `/` or `.`."""
IN_RANKS = ("ppo.estimator", "ppo.policy_loss")
"""The functions of the user that ranks call."""


def check_files_on_nodes(experiment: Experiment, nodes: Mapping[str, Collection[str]]) -> None:
    """Check that every node on which actors will run has what they read. Ray must be initialized.

    Args:
        experiment: The settings.
        nodes: For each kind of actor, the ids of its nodes.

    Raises:
        UserError: A node lacks something.
    """
    paths = {RANK: paths_of_ranks(experiment), WORKER: paths_of_workers(experiment)}
    for kind, own_nodes in nodes.items():
        for key, path in paths[kind].items():
            check_path_on_nodes(key, path, f"{kind}s", own_nodes)


def paths_of_workers(experiment: Experiment) -> dict[str, str]:
    """What rollout workers read, by the settings that name it; without names of models on the hub."""
    paths = _without_hub_names({"model.path": experiment.model.path})
    template = experiment.model.chat_template
    if template is not None and template not in BUILT_IN:
        paths["model.chat_template"] = template
    return paths


def paths_of_ranks(experiment: Experiment) -> dict[str, str]:
    """The folders and files that ranks read, by the settings that name them."""
    paths = _without_hub_names({"model.path": experiment.model.path})
    if "ppo" not in experiment.stages:
        return paths
    critic = experiment.ppo.active_critic
    if critic is not None and critic.model is not None:
        paths |= _without_hub_names({"ppo.critic.model": critic.model})
    for key, function in user_functions(experiment).items():
        file = function.rpartition(":")[0]
        if key in IN_RANKS and file.endswith(".py"):
            paths[key] = file
    return paths


def _without_hub_names(paths: dict[str, str]) -> dict[str, str]:
    return {key: path for key, path in paths.items() if not is_hub_name(path)}


def is_hub_name(name: str) -> bool:
    """Whether this names a model on the hub: it has the form of a name, and there is no such folder here."""
    return HUB_NAME.fullmatch(name) is not None and not os.path.exists(name)


def check_path_on_nodes(key: str, path: str, actors: str, nodes: Iterable[str]) -> None:
    """Look for a file or folder on nodes.

    Args:
        key: The setting that names it.
        path: The path.
        actors: The actors that read it, for messages.
        nodes: The ids of the nodes.

    Raises:
        UserError: A node lacks it.
    """
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    found = {addresses[node]: _exists_on(node, path) for node in nodes}
    for address, reference in found.items():
        if not ray.get(reference):
            where = "" if os.path.isabs(path) else ", in the folder in which `ray start` was called"
            raise UserError(
                f"{key}: no {path} on node {address}{where}: {actors} read it there; put it there under the same "
                "path, or on a file system that all nodes share"
            )


def _exists_on(node: str, path: str) -> "ray.ObjectRef[bool]":
    """Look for a path on one node."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(os.path.exists).options(num_cpus=0, scheduling_strategy=strategy).remote(path)
