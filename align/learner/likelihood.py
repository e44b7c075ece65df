"""The objective of demonstrations: of SFT, and of PPO where they are mixed in."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from align.data.examples import TokenizedDemonstration, pack_demonstrations
from align.roles.trained import TrainedModule
from policies.batching import Batch
from policies.logprobs import Head, smoothed_logprobs, symmetric_divergence, token_logprobs


def collate_demonstrations(demonstrations: Sequence[TokenizedDemonstration], device: torch.device) -> tuple[Batch]:
    """Collate demonstrations into the tensors of one forward pass."""
    return (pack_demonstrations(demonstrations).to(device),)


def likelihood_objective(module: TrainedModule, batch: Batch, role: str) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of the trained tokens of demonstrations, in nats, summed.

    Args:
        module: The module whose first trunk computes it.
        batch: The demonstrations; its response tokens are those that are trained.
        role: The role whose adapter is used.

    Returns:
        The loss `[]`, and the same without a gradient.
    """
    loss = -trained_logprobs(module, batch, role).sum()
    return loss, loss.detach()


def trained_logprobs(
    module: TrainedModule, batch: Batch, role: str, smoothing: float = 0.0, noise: float = 0.0
) -> Tensor:
    """Log-probabilities `[P]` of the trained tokens of demonstrations, in nats.

    Args:
        module: The module whose first trunk computes them.
        batch: The demonstrations; its response tokens are those that are trained.
        role: The role whose adapter is used.
        smoothing: Share of the labels that could be any token, see `smoothed_logprobs`.
        noise: α of NEFTune, see `Trunk.hidden_packed`.
    """
    trunk = module.trunks[0]
    states = trunk.hidden_packed(batch.ids, batch.lengths, role, noise)[batch.predictors]  # [N, H] -> [P, H]
    return _logprobs_of(states, batch, partial(trunk.head, role=role), smoothing)


def routed_logprobs(
    module: TrainedModule, batch: Batch, role: str, smoothing: float = 0.0, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `trained_logprobs`, under the first of two routes, and how far the second route predicts other tokens.

    Arguments as of `trained_logprobs`.

    Returns:
        The log-probabilities, and the symmetric divergences of the consistency regularisation of AdaMix; both `[P]`, in
        nats.
    """
    trunk = module.trunks[0]
    states: list[Tensor] = []  # [P, H] each
    for route in range(2):
        trunk.take_route(role, route)
        states.append(trunk.hidden_packed(batch.ids, batch.lengths, role, noise)[batch.predictors])
    head = partial(trunk.head, role=role)
    return _logprobs_of(states[0], batch, head, smoothing), symmetric_divergence(states[0], states[1], head)


def _logprobs_of(states: Tensor, batch: Batch, head: Head, smoothing: float) -> Tensor:
    if smoothing:
        return smoothed_logprobs(states, batch.response_ids, head, smoothing)
    return token_logprobs(states, batch.response_ids, head, temperature=1.0)
