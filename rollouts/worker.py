"""The Ray actor that holds an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef

from policies.device import ComputeSettings
from rollouts.engine import Engine, Sampling
from rollouts.roster import WeightsVersion
from rollouts.trajectory import Request, Trajectory
from rollouts.weight_transfer import unpack


@dataclass(frozen=True)
class Reply:
    """What a worker says: the weights that it holds, and trajectories if asked for them."""

    held: WeightsVersion
    trajectories: list[Trajectory]


class Worker:
    """Serves one engine. Every reply names the weights in use, so that a worker with others is found out."""

    def __init__(self, build: Callable[[], Engine], computing: ComputeSettings) -> None:
        computing.apply()
        self.engine = build()

    def apply(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What RLlib's manager calls. An exception goes back to it; RLlib's own actors would end their process."""
        return func(self, *args, **kwargs)

    def load_adapter(self, version: int, bundles: Sequence[ObjectRef]) -> Reply:
        """Use the weights in these parcels, which lie in Ray's store."""
        weights = unpack(ray.get(list(bundles)))
        self.held = WeightsVersion(version, self.engine.load_adapter(version, weights))
        return Reply(self.held, [])

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Reply:
        return Reply(self.held, self.engine.generate(requests, sampling))
