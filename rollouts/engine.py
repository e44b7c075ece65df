"""What a rollout engine is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.trajectory import Request, Trajectory


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; log-probabilities are then those at temperature 1."""

    temperature: float
    max_new_tokens: int


class Engine(Protocol):
    """Generates responses under versioned adapter weights."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """One trajectory a request, in their order, each stamped with the version of the weights in use."""
        ...

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Use these weights from now on. Returns the fingerprint of what is now loaded."""
        ...
