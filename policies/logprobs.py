"""Log-probabilities and entropy of response tokens, without logits for any other position."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Positions whose logits exist at one time."""


def token_logprobs(
    hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token and entropy of the distribution that it was drawn from.

    hidden: `[P, H]`, the states that predict the tokens; tokens: `[P]` int64; head: states to logits `[*, V]`.
    The distribution is softmax(logits / temperature). Both results are `[P]` float32, in nats.
    Logits are made for `CHUNK` positions at a time and, in the backward pass, made again.
    """
    if len(tokens) <= CHUNK:
        return _chunk(hidden, tokens, head, temperature)
    parts = [
        checkpoint(_chunk, h, t, head, temperature, use_reentrant=False)
        if torch.is_grad_enabled()
        else _chunk(h, t, head, temperature)
        for h, t in zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk(
    hidden: Tensor, tokens: Tensor, head: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
