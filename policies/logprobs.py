"""Log-probabilities and entropy of response tokens, without logits for any other position."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Positions whose logits exist at one time."""

Head = Callable[[Tensor], Tensor]
"""Hidden states `[*, H]` to logits `[*, V]`."""


def token_logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> Tensor:
    """Log-probability of each token, `[P]` float32, in nats.

    hidden: `[P, H]`, the states that predict the tokens; tokens: `[P]` int64.
    The distribution is softmax(logits / temperature). Logits are made for `CHUNK` positions at a time and, in the
    backward pass, made again.
    """
    return _chunked(partial(_logprobs, head=head, temperature=temperature), hidden, tokens)[0]


def token_logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, and the entropy of the distribution that each token was drawn from, both `[P]`.

    learn_entropy: whether the entropy carries a gradient.
    """
    function = partial(_logprobs_and_entropy, head=head, temperature=temperature, learn_entropy=learn_entropy)
    logprobs, entropies = _chunked(function, hidden, tokens)
    return logprobs, entropies


def shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    """How much less likely each token is than the most likely one: `[P]` float32, in nats; 0 for the greedy choice."""
    return _chunked(partial(_shortfalls, head=head), hidden, tokens)[0]


def _chunked(function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, tokens: Tensor) -> list[Tensor]:
    chunks = list(zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    return [torch.cat(parts) for parts in zip(*(function(h, t) for h, t in chunks), strict=True)]


def _distribution(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    logits = head(hidden).float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor]:
    return (_distribution(hidden, head, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1),)


def _shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> tuple[Tensor]:
    logits = head(hidden).float()
    return (logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),)


def _logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    whole = _distribution(hidden, head, temperature)
    # Before the entropy: what is made again for the backward pass ends with the last that the backward pass needs.
    logprobs = whole.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):
        entropy = -torch.linalg.vecdot(whole.exp(), whole)
    return logprobs, entropy
