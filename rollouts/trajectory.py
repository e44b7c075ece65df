"""The records of a rollout: a request, its response, and what the learner's roles compute for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from policies.text.tokenization import Prompt


@dataclass(frozen=True)
class Request:
    """A prompt to respond to.

    The response depends only on the request, the sampling parameters and the weights.

    Args:
        prompt: The prompt as the user wrote it.
        prompt_ids: Its token ids.
        seed: The seed of the draws of this response.
        columns: The other columns of the data row.
        partial_response: The response so far, which the engine continues (see `Sampling.segment_tokens`).
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


class ScoredTokens(Protocol):
    """A prompt and its response, as the learner's roles score them."""

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""

    @property
    def response_ids(self) -> tuple[int, ...]:
        """Token ids of the response."""

    @property
    def total_length(self) -> int:
        """The number of prompt and response tokens."""


@dataclass(frozen=True)
class Trajectory:
    """A request and its response of T tokens. Tensors are on the CPU, not padded, and own their
    storage.

    Args:
        request: The request.
        response_ids: Token ids up to and including the first stop token; at most `max_new_tokens`.
        sampler_logprobs: `[T]` float32, in nats: the log-probability of each token under the distribution that it was
            drawn from, as the engine computed it.
        ended: Whether the last token ends the response; otherwise it was truncated at the length limit.
        versions: Per token, the version of the adapter weights that it was drawn with; never decreasing.
        inserted: The first of the tokens of each text that the policy has not sampled, and one past its last, in order;
            their log-probability is 0, and their version that of the token before them.
    """

    request: Request
    response_ids: tuple[int, ...]
    sampler_logprobs: Tensor
    ended: bool
    versions: tuple[int, ...]
    inserted: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_tokens(
        cls, request: Request, tokens: Sequence[int], logprobs: Sequence[float] | Tensor, ended: bool, version: int
    ) -> "Trajectory":
        """Append new tokens, all drawn with one version of the weights, to the partial response of a request, if any.

        Args:
            request: The request that the engine was given.
            tokens: The new token ids, without those of the partial response.
            logprobs: Their log-probabilities, one per new token.
            ended: Whether the last token ends the response.
            version: The version of the weights.

        Returns:
            The trajectory of the original request, with the tokens of the partial response first.
        """
        partial = request.partial_response
        new_logprobs = torch.as_tensor(logprobs, dtype=torch.float32)  # [new tokens]
        new_versions = (version,) * len(tokens)
        if partial is None:
            return cls(
                request=request,
                response_ids=tuple(tokens),
                sampler_logprobs=new_logprobs,
                ended=ended,
                versions=new_versions,
            )
        return cls(
            request=partial.request,
            response_ids=partial.response_ids + tuple(tokens),
            sampler_logprobs=torch.cat([partial.sampler_logprobs, new_logprobs]),  # [T]
            ended=ended,
            versions=partial.versions + new_versions,
            inserted=partial.inserted,
        )

    def with_inserted(self, tokens: Sequence[int]) -> "Trajectory":
        """The unfinished response that continues this one by tokens which the policy has not sampled."""
        end = self.length + len(tokens)
        return replace(
            self,
            response_ids=self.response_ids + tuple(tokens),
            sampler_logprobs=torch.cat([self.sampler_logprobs, torch.zeros(len(tokens))]),  # [T]
            ended=False,
            versions=self.versions + self.versions[-1:] * len(tokens),
            inserted=(*self.inserted, (self.length, end)),
        )

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Token ids of the prompt."""
        return self.request.prompt_ids

    @property
    def length(self) -> int:
        """T, the number of response tokens."""
        return len(self.response_ids)

    @property
    def total_length(self) -> int:
        """The number of prompt and response tokens."""
        return len(self.prompt_ids) + self.length

    @property
    def sampled_length(self) -> int:
        """The number of response tokens that the policy has sampled."""
        return self.length - sum(end - start for start, end in self.inserted)

    def of_policy(self, values: Tensor) -> Tensor:
        """Of values `[T]` of the response tokens, those of the tokens that the policy has sampled."""
        return values[policy_mask(self.length, self.inserted)] if self.inserted else values


def policy_mask(length: int, inserted: Sequence[tuple[int, int]]) -> Tensor:
    """Whether the policy has sampled each token of a response, `[T]` bool; `inserted` as of `Trajectory`."""
    mask = torch.ones(length, dtype=torch.bool)
    for start, end in inserted:
        mask[start:end] = False
    return mask


@dataclass
class RoleOutputs:
    """What the learner's four roles compute for a trajectory of T tokens. Tensors are float32, on the CPU, and
    own their storage.

    Args:
        logprobs: `[T]`, in nats: each response token under the policy.
        reference_logprobs: `[T]`, in nats: each response token under the reference.
        values: `[T + 1]`: the critic's value before each response token and after the last; empty without a critic.
        score: The reward of the whole response, its step rewards included.
        reward_outputs: `[C]`: the outputs of the reward heads on the base model; empty without such heads.
        notes: Further figures of the response by name, for logging.
        shortfalls: `[T]`, in nats: how much less likely the policy finds each token than its most likely one; empty
            where it was not requested.
        logit_spacings: `[T]`, in nats: the unit in the last place of the logits that predict each token; empty where
            it was not requested.
        step_rewards: `[T]`: the part of the score that is the reward of each token; None without step rewards.
        token_scores: `[T]`: the outputs of the head of a process reward model at each response token; empty without
            such a model on the base model.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    score: float
    reward_outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    notes: dict[str, float] = field(default_factory=dict)
    shortfalls: Tensor = field(default_factory=lambda: torch.empty(0))
    logit_spacings: Tensor = field(default_factory=lambda: torch.empty(0))
    step_rewards: Tensor | None = None
    token_scores: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def outcome(self) -> float:
        """The part of the score that the response gets at its end: the score minus the sum of the step rewards."""
        return self.score if self.step_rewards is None else self.score - float(self.step_rewards.double().sum())

    @property
    def kl(self) -> float:
        """The k1 estimate of the response's KL divergence from the reference, in nats."""
        return float((self.logprobs - self.reference_logprobs).sum())


def lengths(trajectories: Sequence[Trajectory]) -> Tensor:
    """The number of response tokens of each trajectory, `[B]` int64."""
    return torch.tensor([trajectory.length for trajectory in trajectories])
