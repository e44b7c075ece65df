"""Log-probabilities and entropy of response tokens, without logits for any other position."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from policies.layers import kernel_calls, native

CHUNK = 1024
"""Positions whose logits exist at one time: with a vocabulary of 150,000 they take 600 MB in float32."""

Head = Callable[[Tensor], Tensor]
"""Hidden states `[*, H]` to logits `[*, V]`."""


def token_logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> Tensor:
    """Log-probability of each token under softmax(logits / temperature).

    Logits are computed for `CHUNK` positions at a time, and only once: the gradient that the backward pass needs is
    computed along with them. Only where the head is trained they are recomputed.

    Args:
        hidden: `[P, H]`, the states that predict the tokens.
        tokens: `[P]` int64.
        head: The LM head.
        temperature: The temperature at which the tokens were sampled.

    Returns:
        `[P]` float32, in nats.
    """
    if torch.is_grad_enabled():
        logprobs, _ = token_logprobs_and_entropy(
            hidden=hidden, tokens=tokens, head=head, temperature=temperature, learn_entropy=False
        )
        return logprobs
    return _by_chunks(partial(_logprobs, head=head, temperature=temperature), hidden, tokens)[0]


def token_logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of the distribution that it was sampled from.

    Args:
        hidden: `[P, H]`, the states that predict the tokens.
        tokens: `[P]` int64.
        head: The LM head.
        temperature: The temperature at which the tokens were sampled.
        learn_entropy: Whether the entropy carries a gradient.

    Returns:
        Log-probabilities and entropies, both `[P]` float32, in nats.
    """
    function = partial(_logprobs_and_entropy, head=head, temperature=temperature, learn_entropy=learn_entropy)
    if torch.is_grad_enabled():
        # The head is trained if its output carries a gradient although its input does not.
        if learn_entropy or head(hidden[:0].detach()).requires_grad:
            function = partial(checkpoint, function, use_reentrant=False)
        elif hidden.requires_grad:
            function = partial(_frozen_head, head=head, temperature=temperature)
    logprobs, entropies = _by_chunks(function, hidden, tokens)
    return logprobs, entropies


def smoothed_logprobs(hidden: Tensor, tokens: Tensor, head: Head, smoothing: float) -> Tensor:
    """Log-likelihood of each token, if a share of the labels could be any token (Szegedy et al. 2016, section 7).

    (1 - ε) log p(t) + ε · mean over the vocabulary of log p(v). The logits are computed again in the backward pass.

    Args:
        hidden: `[P, H]`, the states that predict the tokens.
        tokens: `[P]` int64.
        head: The LM head.
        smoothing: ε.

    Returns:
        `[P]` float32, in nats.
    """
    function = partial(_smoothed, head=head, smoothing=smoothing)
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False)
    return _by_chunks(function, hidden, tokens)[0]


def _smoothed(hidden: Tensor, tokens: Tensor, head: Head, smoothing: float) -> tuple[Tensor]:
    all_logprobs = _log_softmax(head(hidden), 1.0)  # [P, V]
    return ((1 - smoothing) * _select(all_logprobs, tokens) + smoothing * all_logprobs.mean(-1),)


def symmetric_divergence(hidden: Tensor, other: Tensor, head: Head) -> Tensor:
    """The mean of the two KL divergences between the distributions p and q that two states predict.

    ½ (KL(p‖q) + KL(q‖p)) = ½ Σ (p − q) (log p − log q). Logits are computed for `CHUNK` positions at a time, and again
    in the backward pass.

    Args:
        hidden: `[P, H]`, states that predict p.
        other: `[P, H]`, states that predict q.
        head: The LM head.

    Returns:
        `[P]` float32, in nats.
    """
    function = partial(checkpoint, partial(_symmetric_divergence, head=head), use_reentrant=False)
    return torch.cat([function(*chunks) for chunks in zip(hidden.split(CHUNK), other.split(CHUNK), strict=True)])


def _symmetric_divergence(hidden: Tensor, other: Tensor, head: Head) -> Tensor:
    logprobs = _log_softmax(head(hidden), 1.0)  # [P, V]
    other_logprobs = _log_softmax(head(other), 1.0)  # [P, V]
    return 0.5 * torch.linalg.vecdot(logprobs.exp() - other_logprobs.exp(), logprobs - other_logprobs)  # [P]


TF32_EPSILON = 2.0**-10
"""Spacing of TF32 numbers from 1 to 2, in which float32 products are computed where that is allowed."""


def shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """How much less likely each token is than the most likely one, and how finely this can be told.

    Args:
        hidden: `[P, H]`, the states that predict the tokens.
        tokens: `[P]` int64.
        head: The LM head.

    Returns:
        Shortfalls, 0 for the greedy choice, and the unit in the last place of the position's logits: the spacing, at
        the larger of the likeliest token's logit and the token's own, of the numbers in which they are computed. That
        is the dtype of the states, but TF32 for float32. Both `[P]` float32, in nats.
    """
    all_shortfalls, spacings = _by_chunks(partial(_shortfalls, head=head), hidden, tokens)
    return all_shortfalls, spacings


def _by_chunks(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, tokens: Tensor
) -> list[Tensor]:
    """Call a function on `CHUNK` positions at a time, and join its results: one `[P]` tensor for each."""
    chunks = zip(hidden.split(CHUNK), tokens.split(CHUNK), strict=True)
    results = [function(chunk_hidden, chunk_tokens) for chunk_hidden, chunk_tokens in chunks]
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities `[P, V]` float32 of all tokens."""
    logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def _select(all_logprobs: Tensor, tokens: Tensor) -> Tensor:
    """The entries `[P]` of `[P, V]` at the tokens `[P]`."""
    return all_logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def _from_logits(
    logits: Tensor, tokens: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of tokens and entropies, `[P]` float32, of logits `[P, V]` that carry no gradient.

    with_gradient: also softmax − 1[token], `[P, V]` in the dtype of the logits: −temperature · ∂ log p(t) / ∂ logits.
    """
    if native.runs(logits):
        return _from_logits_by_kernel(logits.contiguous(), tokens, temperature, with_gradient)
    all_logprobs = _log_softmax(logits, temperature)  # [P, V]
    logprobs = _select(all_logprobs, tokens)  # [P]
    probabilities = all_logprobs.exp()  # [P, V]
    entropy = -torch.linalg.vecdot(probabilities, all_logprobs)  # [P]
    if not with_gradient:
        return logprobs, entropy, None
    indices = tokens.unsqueeze(-1)  # [P, 1]
    gradient = probabilities.scatter_add_(-1, indices, probabilities.new_full(indices.shape, -1.0))  # [P, V]
    return logprobs, entropy, gradient.to(logits.dtype)


def _from_logits_by_kernel(
    logits: Tensor, tokens: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`_from_logits` on the CPU, in one pass over memory."""
    positions, vocabulary = logits.shape
    if positions and not 0 <= int(tokens.amin()) <= int(tokens.amax()) < vocabulary:
        raise IndexError(
            f"token ids must be from 0 to {vocabulary - 1}, the vocabulary of {vocabulary} that the logits have; "
            f"found {int(tokens.amin())} to {int(tokens.amax())}"
        )
    return kernel_calls.logprobs(logits, tokens.contiguous(), temperature, with_gradient)


def _logprobs(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor]:
    return (_from_logits(head(hidden), tokens, temperature, with_gradient=False)[0],)


def _shortfalls(hidden: Tensor, tokens: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()  # [P, V]
    largest = logits.amax(-1)  # [P]
    own = _select(logits, tokens)  # [P]
    exponents = torch.frexp(torch.maximum(largest.abs(), own.abs())).exponent  # [P], of numbers in [0.5, 1)
    step = max(torch.finfo(hidden.dtype).eps, TF32_EPSILON)
    return largest - own, torch.ldexp(torch.full_like(own, step / 2), exponents)


def _logprobs_and_entropy(
    hidden: Tensor, tokens: Tensor, head: Head, temperature: float, learn_entropy: bool
) -> tuple[Tensor, Tensor]:
    logits = head(hidden)  # [P, V]
    if not logits.requires_grad:
        return _from_logits(logits, tokens, temperature, with_gradient=False)[:2]
    all_logprobs = _log_softmax(logits, temperature)  # [P, V]
    # Before the entropy: recomputation stops at the last tensor that the backward pass needs.
    logprobs = _select(all_logprobs, tokens)
    with torch.set_grad_enabled(learn_entropy):
        entropy = -torch.linalg.vecdot(all_logprobs.exp(), all_logprobs)
    return logprobs, entropy


def _frozen_head(hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs, entropy = _FrozenHead.apply(hidden, tokens, head, temperature)
    return logprobs, entropy


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities of tokens, and entropies without a gradient, under a head that is not trained.

    A log-probability depends on the state of its own position alone. So its gradient with respect to that state is
    computed in the forward pass, where the logits exist, and the backward pass only scales it:
    ∂ log p(t) / ∂ logits = (1[t] − p) / temperature.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tokens: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        states = hidden.detach().requires_grad_()  # [P, H]
        with torch.enable_grad():
            logits = head(states)  # [P, V]
        logprobs, entropy, logits_gradient = _from_logits(logits.detach(), tokens, temperature, with_gradient=True)
        (state_gradient,) = torch.autograd.grad(logits, states, logits_gradient)  # [P, H], times -temperature
        ctx.save_for_backward(state_gradient)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (state_gradient,) = ctx.saved_tensors
        scale = (out_gradient / -ctx.temperature).unsqueeze(-1)  # [P, 1]
        return (state_gradient * scale).to(state_gradient.dtype), None, None, None
