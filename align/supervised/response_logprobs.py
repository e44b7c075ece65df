"""Log-probabilities of whole responses, with and without a gradient."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from align.learner.rank import Rank
from align.supervised.objective import SupervisedModule
from policies.batching import Batch, collate
from policies.logprobs import token_logprobs

RESPONSES_AT_ONCE = 1024
"""Responses whose log-probabilities the ranks exchange at once."""


@dataclass(frozen=True)
class PromptedResponse:
    """A prompt and a response to it, as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class _Numbered:
    """A response and its number in a block."""

    number: int
    response: PromptedResponse

    @property
    def length(self) -> int:
        return self.response.length


def collate_responses(responses: Sequence[PromptedResponse]) -> Batch:
    """Pack responses, each after its prompt."""
    prompts = [response.prompt_ids for response in responses]
    return collate(prompts, [response.response_ids for response in responses])


def response_logprobs(module: SupervisedModule, batch: Batch) -> Tensor:
    """Log-probabilities `[B]` float64 of the responses of a batch under the module's role, in nats."""
    trunk = module.trunk
    states = trunk.hidden_packed(batch.ids, batch.lengths, module.role)  # [N, H]
    head = partial(trunk.head, role=module.role)
    logprobs = token_logprobs(states[batch.predictors], batch.response_ids, head, temperature=1.0)  # [P]
    # A difference of two sums over many tokens: float32 would leave its rounding in the loss.
    return torch.stack([tokens.sum() for tokens in batch.split(logprobs.double())])


def current_logprobs(rank: Rank, responses: Sequence[PromptedResponse]) -> list[float]:
    """Log-probabilities of responses under the current weights, without a gradient, in nats.

    All ranks must call it with the same responses; each computes a share of them.

    Args:
        rank: This rank, around a `SupervisedModule`.
        responses: The responses of all ranks.

    Returns:
        One for each response, the same on all ranks.
    """
    logprobs: list[float] = []
    for start in range(0, len(responses), RESPONSES_AT_ONCE):
        block = [_Numbered(number, item) for number, item in enumerate(responses[start : start + RESPONSES_AT_ONCE])]
        objective = partial(_placed, size=len(block))
        logprobs += rank.evaluate(block, objective, partial(_collate, device=rank.device)).tolist()
    return logprobs


def _collate(block: Sequence[_Numbered], device: torch.device) -> tuple[Batch, Tensor]:
    """The tensors of a microbatch, and the numbers `[B]` of its responses."""
    numbers = torch.tensor([item.number for item in block], device=device)
    return collate_responses([item.response for item in block]).to(device), numbers


def _placed(module: SupervisedModule, batch: Batch, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Their log-probabilities at their places in a vector `[size]` of zeros: those of all microbatches add up."""
    logprobs = response_logprobs(module, batch)  # [B]
    placed = logprobs.new_zeros(size).index_copy(0, numbers, logprobs)
    return placed.sum(), placed
