"""The Ray actor that runs an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

from policies.device import ComputeSettings
from rollouts.engine import Engine, Sampling
from rollouts.packed_records import TrajectoryBatch
from rollouts.roster import WeightsVersion
from rollouts.trajectory import Request
from rollouts.weight_transfer import unpack


@dataclass(frozen=True)
class Reply:
    """A worker's reply: the weights that it has loaded, and the trajectories of its chunk, if it was given one."""

    loaded: WeightsVersion
    trajectories: TrajectoryBatch


class Worker:
    """Runs one engine. Every reply names the weights in use, so that the pool notices a worker with other weights."""

    def __init__(self, build: Callable[[], Engine], compute: ComputeSettings) -> None:
        self.failure: Exception | None = None
        try:
            compute.apply()
            self.engine = build()
        except Exception as error:  # raised by the first call: of an actor that never started, Ray hides the cause
            self.failure = error

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The method that RLlib's actor manager calls.

        An exception is returned to the manager, whereas RLlib's own actors would end their process.
        """
        if self.failure:
            raise self.failure
        return func(self, *args, **kwargs)

    def load_adapter(self, version: int, bundles: Sequence[ObjectRef]) -> Reply:
        """Use the weights in these bundles of Ray's object store."""
        weights = unpack(ray.get(list(bundles)))
        self.loaded = WeightsVersion(version, self.engine.load_adapter(version, weights))
        return Reply(self.loaded, TrajectoryBatch())

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Reply:
        """Generate the responses of a chunk."""
        return Reply(self.loaded, TrajectoryBatch(self.engine.generate(requests, sampling)))
