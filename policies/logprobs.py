"""Log-probabilities and entropy of response tokens, without logits for any other position."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from policies.layers import native

CHUNK = 1024
"""Positions whose logits exist at one time."""

Head = Callable[[Tensor], Tensor]
"""Hidden states `[*, H]` to logits `[*, V]`."""


def token_logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> Tensor:
    """Log-probability of each token, `[P]` float32, in nats.

    hidden: `[P, H]`, the states that predict the tokens; tokens: `[P]` int64.
    The distribution is softmax(logits / temperature). Logits are made for `CHUNK` positions at a time, and once: what
    the backward pass needs of them is made at once too, unless the head is trained, for which they are made again.
    """
    if torch.is_grad_enabled():
        return token_logprobs_and_entropy(hidden, tokens, head, temperature, learn_entropy=False)[0]
    return _chunked(partial(_logprobs, head=head, temperature=temperature), hidden, tokens)[0]


def token_logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, and the entropy of the distribution that each token was drawn from, both `[P]`.

    learn_entropy: whether the entropy carries a gradient.
    """
    function = partial(_logprobs_and_entropy, head=head, temperature=temperature, learn_entropy=learn_entropy)
    if torch.is_grad_enabled():
        # A head that is given no states tells by its answer whether it is trained.
        if learn_entropy or head(hidden[:0].detach()).requires_grad:
            function = partial(checkpoint, function, use_reentrant=False)
        elif hidden.requires_grad:
            function = partial(_frozen_head, head=head, temperature=temperature)
    logprobs, entropies = _chunked(function, hidden, tokens)
    return logprobs, entropies


def shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> Tensor:
    """How much less likely each token is than the most likely one: `[P]` float32, in nats; 0 for the greedy choice."""
    return _chunked(partial(_shortfalls, head=head), hidden, tokens)[0]


def _chunked(function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, tokens: Tensor) -> list[Tensor]:
    chunks = zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
    return [torch.cat(parts) for parts in zip(*(function(h, t) for h, t in chunks), strict=True)]


def _normalised(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _of_tokens(
    logits: Tensor, tokens: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of tokens and entropies, `[P]` float32, of logits `[P, V]` that carry no gradient.

    gradient: also softmax - 1[token], `[P, V]` in the dtype of the logits: -temperature · ∂ log p(t) / ∂ logits.
    """
    if native.runs(logits):
        return _of_tokens_at_once(logits.contiguous(), tokens, temperature, gradient)
    whole, chosen = _normalised(logits, temperature), tokens.unsqueeze(-1)
    logprobs, chances = whole.gather(-1, chosen).squeeze(-1), whole.exp()
    entropy = -torch.linalg.vecdot(chances, whole)
    if not gradient:
        return logprobs, entropy, None
    return logprobs, entropy, chances.scatter_add_(-1, chosen, chances.new_full(chosen.shape, -1.0)).to(logits.dtype)


def _of_tokens_at_once(
    logits: Tensor, tokens: Tensor, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In one pass over memory, on the CPU."""
    positions, vocabulary = logits.shape
    if positions and not 0 <= int(tokens.amin()) <= int(tokens.amax()) < vocabulary:
        raise IndexError(f"a token is not one of the {vocabulary} that there are logits of")
    logprobs, entropy = logits.new_empty(2, positions, dtype=torch.float32)
    minus = torch.empty_like(logits) if gradient else None
    made = logprobs, entropy, 0 if minus is None else minus
    given = logits, tokens.contiguous(), positions, vocabulary, float(temperature)
    native.call("logprobs", logits.dtype, *given, *made)
    return logprobs, entropy, minus


def _logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor]:
    return (_of_tokens(head(hidden), tokens, temperature, gradient=False)[0],)


def _shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> tuple[Tensor]:
    logits = head(hidden).float()
    return (logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1),)


def _logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    if not logits.requires_grad:
        return _of_tokens(logits, tokens, temperature, gradient=False)[:2]
    whole = _normalised(logits, temperature)
    # Before the entropy: what is made again for the backward pass ends with the last that the backward pass needs.
    logprobs = whole.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.set_grad_enabled(learn_entropy):
        entropy = -torch.linalg.vecdot(whole.exp(), whole)
    return logprobs, entropy


def _frozen_head(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs, entropy = _FrozenHead.apply(hidden, tokens, head, temperature)
    return logprobs, entropy


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities of tokens and the entropies, which carry no gradient, under a head that has none either.

    A log-probability depends on its own state alone. So its gradient in that state is made here, where the logits
    exist, and the backward pass has only to weigh it: ∂ log p(t) / ∂ logits = (1[t] - p) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        states = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(states)
        logprobs, entropy, minus = _of_tokens(logits.detach(), tokens, temperature, gradient=True)
        (of_state,) = torch.autograd.grad(logits, states, minus)
        ctx.save_for_backward(of_state)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (of_state,) = ctx.saved_tensors
        return (of_state * (gradient / -ctx.temperature).unsqueeze(-1)).to(of_state.dtype), None, None, None
