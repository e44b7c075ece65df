"""The interface of rollout engines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from policies.trunk import AdapterWeights
from rollouts.trajectory import Request, Trajectory


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Args:
        temperature: Divides the logits before the softmax. 0 decodes greedily; log-probabilities are then those at
            temperature 1.
        max_new_tokens: The most tokens that a response may have.
        segment_tokens: The most new tokens that an engine draws before it returns a response unfinished, so that the
            caller can continue it with newer weights (see `Request.partial_response`); None: without interruption.
    """

    temperature: float
    max_new_tokens: int
    segment_tokens: int | None = None

    def limit(self, request: Request) -> int:
        """The most response tokens, partial response included, with which the engine returns a response."""
        if self.segment_tokens is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, len(request.partial_response_ids) + self.segment_tokens)

    def is_unfinished(self, trajectory: Trajectory) -> bool:
        """Whether a response was returned at the end of a segment and is to be continued."""
        return self.segment_tokens is not None and not trajectory.ended and trajectory.length < self.max_new_tokens


class Engine(Protocol):
    """Generates responses with versioned adapter weights."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Trajectory]:
        """Generate one response per request.

        Args:
            requests: The prompts, each with its own seed.
            sampling: How the responses are drawn.

        Returns:
            One trajectory per request, in the same order. New tokens carry the version of the weights in use.
        """
        ...

    def load_adapter(self, version: int, weights: AdapterWeights) -> str:
        """Use these weights from now on.

        Args:
            version: The version that new tokens carry.
            weights: The tensors of the adapter by name.

        Returns:
            The fingerprint of the adapter that is now loaded.
        """
        ...
