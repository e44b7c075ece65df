"""The Ray actor that runs an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

from policies.device import ComputeSettings
from policies.memory_meter import MemoryMeter
from rollouts.engine import Engine, Sampling
from rollouts.packed_records import TrajectoryBatch
from rollouts.roster import WeightsVersion
from rollouts.trajectory import Request
from rollouts.weight_transfer import unpack


@dataclass(frozen=True)
class Reply:
    """A worker's reply.

    Attributes:
        loaded: The weights that it has loaded.
        trajectories: Those of its chunk, if it was given one.
        peak_memory: The peak of its memory in bytes; None where it is not known. See `MemoryMeter`.
    """

    loaded: WeightsVersion
    trajectories: TrajectoryBatch
    peak_memory: int | None = None


class Worker:
    """Runs one engine. Every reply names the weights in use, so that the pool notices a worker with other weights."""

    def __init__(self, build: Callable[[], Engine], compute: ComputeSettings) -> None:
        self.failure: Exception | None = None
        try:
            compute.apply()
            self.meter = MemoryMeter()
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
        trajectories = TrajectoryBatch(self.engine.generate(requests, sampling))
        return Reply(self.loaded, trajectories, self.meter.peak())
