"""The record that the loop passes on: one prompt with one response, and what is known of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from policies.text.tokenization import Prompt


@dataclass(frozen=True)
class Request:
    """A prompt to answer. The response depends on these, the sampling and the weights, and on nothing else.

    prompt: as the user wrote it; prompt_ids: its tokens; seed: of the sampling; columns: the row's other columns.
    partial_response: the response so far, which goes on (see `Sampling.segment_tokens`).
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    seed: int
    columns: dict[str, Any] = field(default_factory=dict)
    partial_response: "Trajectory | None" = None

    @property
    def partial_response_ids(self) -> tuple[int, ...]:
        """The tokens of the response so far."""
        return self.partial_response.response_ids if self.partial_response else ()


@dataclass(frozen=True)
class Trajectory:
    """A request and its response of T tokens. Tensors are on the CPU and of true length: nothing is masked.

    response_ids: the tokens up to and with the first that stops, at most `max_new_tokens`.
    sampler_logprobs: `[T]` float32, nats, of the sampled distribution, as the engine computed them.
    ended: whether the last token stops the response; if not, it was cut at the length limit.
    versions: of the adapter weights that made each token, never falling.
    """

    request: Request
    response_ids: tuple[int, ...]
    sampler_logprobs: Tensor
    ended: bool
    versions: tuple[int, ...]

    @classmethod
    def from_tokens(
        cls, request: Request, tokens: Sequence[int], logprobs: Sequence[float] | Tensor, ended: bool, version: int
    ) -> "Trajectory":
        """Tokens that weights of one version have added to what was begun of the response, if anything was."""
        before = request.partial_response
        new = torch.as_tensor(logprobs, dtype=torch.float32)
        if before is None:
            return cls(request, tuple(tokens), new, ended, (version,) * len(tokens))
        return cls(
            before.request,
            before.response_ids + tuple(tokens),
            torch.cat([before.sampler_logprobs, new]),
            ended,
            before.versions + (version,) * len(tokens),
        )

    @property
    def length(self) -> int:
        """T."""
        return len(self.response_ids)

    @property
    def total_length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.request.prompt_ids) + self.length


@dataclass
class RoleOutputs:
    """What the learner's four roles say of a trajectory of T tokens: float32, on the CPU.

    logprobs, reference_logprobs: `[T]`, nats, of each response token under policy and reference.
    values: `[T + 1]`, the critic before each response token and after the last; empty without a critic.
    shortfalls: `[T]`, nats, how much less likely each token is to the policy than the likeliest; empty where not asked.
    score: what the reward gives to the whole response. reward_outputs: of the reward heads on the trunk. notes: what else is
    known of the response, by name, to be logged.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    score: float
    reward_outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    notes: dict[str, float] = field(default_factory=dict)
    shortfalls: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def kl(self) -> float:
        """The k1 estimate of the response's KL to the reference, in nats."""
        return float((self.logprobs - self.reference_logprobs).sum())


def lengths(trajectories: Sequence[Trajectory]) -> Tensor:
    """Response tokens `[B]` int64."""
    return torch.tensor([trajectory.length for trajectory in trajectories])
