"""What a rollout engine is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.trajectory import Request, Trajectory


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; log-probabilities are then those at temperature 1.

    segment_tokens: new tokens after which an engine gives a response back as it is, for whoever has it go on (see
    `Request.partial_response`); None: it is made in one go.
    """

    temperature: float
    max_new_tokens: int
    segment_tokens: int | None = None

    def limit(self, request: Request) -> int:
        """Tokens that a response, with what was begun of it, may have when the engine gives it back."""
        if self.segment_tokens is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, len(request.partial_response_ids) + self.segment_tokens)

    def is_unfinished(self, trajectory: Trajectory) -> bool:
        """Whether a response was given back before its end, at the end of a stretch."""
        return self.segment_tokens is not None and not trajectory.ended and trajectory.length < self.max_new_tokens


class Engine(Protocol):
    """Generates responses under versioned adapter weights."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """One trajectory a request, in their order, each stamped with the version of the weights in use."""
        ...

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Use these weights from now on. Returns the fingerprint of what is now loaded."""
        ...
