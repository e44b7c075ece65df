"""Settles what `model.dtype: auto` stands for, before a run starts, by the devices of the processes that will compute.

All processes of a run compute in one dtype. It is recorded in the run's settings, and kept when the run is resumed.
"""

from dataclasses import dataclass
from typing import Any

import torch

from align.config.schema import Experiment
from align.data.datasets import trains_sft
from align.resources.actors import most_actors, reserved_cpus
from align.resources.ray_cluster import ray_cluster
from align.runs.products import wanted_stages
from policies.device import ComputeSettings, Device, describe_device
from policies.errors import UserError, actor_failure
from policies.schema import listed

CONTROLLER = "the controller"

Devices = dict[tuple[str, Device], None]
"""Kinds of processes, each with its device, in order and without repetition."""


@dataclass(frozen=True)
class SettledDtype:
    """An experiment whose `model.dtype` is not `auto`.

    Attributes:
        experiment: The settings.
        text: The dtype and what has settled it, for the plan.
    """

    experiment: Experiment
    text: str


def settle_dtype(experiment: Experiment, recorded: str | None = None) -> SettledDtype:
    """Replace `model.dtype: auto` by the dtype that all processes of a run will compute in.

    Args:
        experiment: The settings of the run.
        recorded: The dtype of the run that these settings continue, which is kept; None: a new run.

    Raises:
        UserError: Processes have devices that suit different dtypes, or the cluster does not start the processes.
    """
    dtype = experiment.model.dtype
    if recorded is not None and dtype in ("auto", recorded):
        return _settled(experiment, recorded, "in which the run was started")
    if dtype != "auto":
        return SettledDtype(experiment, f"{dtype}, as set")
    method = experiment.policy.spec
    if not method.below_float32:
        return _settled(experiment, "float32", f"because {method.name} trains the weights themselves")
    devices = _devices(experiment)
    dtypes = {device.fast_dtype for _, device in devices}
    if len(dtypes) > 1:
        differences = [f"{process} in {device.fast_dtype} ({device.name})" for process, device in devices]
        raise UserError(
            "model.dtype: all processes of a run compute in one dtype, and `auto` would let "
            f"{listed(differences)} compute: set model.dtype to float32 or bfloat16"
        )
    names = dict.fromkeys(device.name for _, device in devices)
    processes = dict.fromkeys(process for process, _ in devices)
    return _settled(experiment, dtypes.pop(), f"which suits {', '.join(names)} of {listed(list(processes))}")


def _settled(experiment: Experiment, dtype: str, reason: str) -> SettledDtype:
    model = experiment.model.model_copy(update={"dtype": dtype})
    return SettledDtype(experiment.model_copy(update={"model": model}), f"{dtype}, {reason}")


def _devices(experiment: Experiment) -> Devices:
    """The processes that will load the base model, with their devices."""
    actors = most_actors(experiment, experiment.stages)
    devices: Devices = {}
    if _controller_computes(experiment) or not actors:
        devices[CONTROLLER, describe_device()] = None
    if actors and (experiment.cluster.address_to_join or torch.cuda.is_available()):
        return devices | _devices_of_actors(experiment, actors)
    for kind in actors:
        devices[f"the {kind}s", describe_device()] = None
    return devices


def _controller_computes(experiment: Experiment) -> bool:
    """Whether the process that runs the stages loads the base model itself."""
    ppo_in_actors = experiment.rollouts.workers > 0 and experiment.learner.ranks > 0
    reward = experiment.reward
    return (
        (trains_sft(experiment) and not experiment.ranks_of(experiment.sft))
        or "classify" in experiment.stages
        or ("reward" in wanted_stages(experiment) and (reward.classifier is None or reward.normalise > 0))
        or ("ppo" in experiment.stages and not ppo_in_actors)
    )


class _Probe:
    """An actor that is placed as one of the run's own, and reports its device."""

    def device(self, compute: ComputeSettings) -> Device:
        compute.apply()
        return describe_device()


def _devices_of_actors(experiment: Experiment, actors: dict[str, int]) -> Devices:
    """Start an actor in the place of each of the run's own, and ask for their devices.

    Args:
        experiment: The settings.
        actors: The number of actors by kind.

    Raises:
        UserError: The cluster cannot be reached or has no room for the actors, or one that has a GPU cannot use it.
    """
    devices: Devices = {}
    with ray_cluster(experiment.cluster, reserved_cpus(experiment, actors)):
        import ray  # slow to import, and only after its environment variables are set

        from align.resources.reservation import reserve

        reservation = reserve(experiment, actors)
        for kind in actors:
            replies = []
            for actor in reservation.actors(kind):
                probe: Any = ray.remote(_Probe).options(**actor.options).remote()
                replies.append(probe.device.remote(actor.compute))
            try:
                found = ray.get(replies)
            except ray.exceptions.RayTaskError as error:
                raise actor_failure(error, f"a {kind}") from error
            devices |= {(f"the {kind}s", device): None for device in found}
        reservation.release()  # the connection may last
    return devices
