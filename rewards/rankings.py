"""Likelihoods of rankings of K responses, with and without ties: pure functions of scores.

The worth of a response is exp(score). Scores `[N, K]` stand best first; `sizes` are those of the groups of equal rank,
in that order: (1, 2, 1) is a first, two that share the second place, and a last. Results `[N]` are in nats.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

NOTHING = -1e30
"""Log of a weight of zero; not -inf, whose gradients are no numbers."""

MOST_OPEN = 10
"""Most responses of one group whose order is unknown: the sum has 2 to the power of it terms."""


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """Negative log-likelihood of a strict ranking: the best is chosen of all, the next of those that are left.

    Σ_k  log Σ_{j ≥ k} exp(s_j) - s_k                       Plackett (1975); Luce (1959); K = 2: Bradley and Terry
    """
    return (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1)


def davidson_luce_loss(scores: Tensor, sizes: Sequence[int], log_ties: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking whose ties are judgements: these responses were found equally good.

    At each place a set T of the responses that are left is chosen, of up to D = len(log_ties) members, with weight
    δ_|T| · (the geometric mean of its worths), normalised over all such sets (Firth, Kosmidis and Turner 2019,
    "Davidson-Luce model for multi-item choice with ties", eq. 3). log_ties: `[D]`, log δ, of which the first is 0; no
    size is above D. D = 1 is Plackett and Luce's model, K = 2 with D = 2 is Davidson's (1970).
    """
    normalisers = _log_sum_of_sets(scores, log_ties)
    loss = scores.new_zeros(len(scores))
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        chosen = log_ties[size - 1] + scores[:, start : start + size].mean(-1)
        loss = loss + normalisers[:, start] - chosen
    return loss


def _log_sum_of_sets(scores: Tensor, log_ties: Tensor) -> Tensor:
    """For each place `[N, K]`, the log of the sum of the weights of all sets of what is left there.

    The sum of all geometric means of sets of t is the elementary symmetric polynomial e_t of exp(s / t); the table
    holds log e_k of exp(s / t) for t and k from 1, of a suffix that grows by one response at a time.
    """
    most = len(log_ties)
    roots = torch.arange(1, most + 1, device=scores.device, dtype=scores.dtype)
    nothing = scores.new_full((len(scores), most, most), NOTHING)
    one = scores.new_zeros(len(scores), most, 1)
    table, sums = nothing, []
    for score in reversed(scores.unbind(-1)):
        grown = torch.cat([one, table[..., :-1]], dim=-1) + (score[:, None] / roots)[..., None]
        table = torch.logaddexp(table, grown)
        sums.append((table.diagonal(dim1=-2, dim2=-1) + log_ties).logsumexp(-1))
    return torch.stack(sums[::-1], dim=-1)


def open_ranking_loss(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Negative log-likelihood of a ranking in which the order within a group is unknown: the sum over all orders.

    Under Plackett and Luce's model, each group's probability of coming before all that follow it, in whatever order
    (marginal likelihood of a partial ranking; Ma et al. 2021, "Learning-to-rank with partitioned preference"). With
    the best alone before one group of all others it is the choice of the best of K. No group but the last is larger
    than `MOST_OPEN`.
    """
    loss = scores.new_zeros(len(scores))
    for start, size in zip(accumulate(sizes, initial=0), sizes[:-1], strict=False):
        loss = loss - _log_first(scores[:, start : start + size], scores[:, start + size :].logsumexp(-1))
    return loss


def _log_first(group: Tensor, rest: Tensor) -> Tensor:
    """Log-probability `[N]` that all of a group `[N, m]` are drawn before any of the rest of log-worth `[N]`.

    By sets, from the empty one: a set has been drawn if one of its members was the last of it to be, and the others
    before. Every term is positive, so nothing cancels.
    """
    size = group.shape[-1]
    members = torch.tensor(_membership(size), device=group.device)  # [2^m, m]
    left = torch.where(members, NOTHING, group[:, None])  # worths that are not yet drawn, for each set
    total = torch.cat([left, rest[:, None, None].expand(-1, 2**size, 1)], dim=-1).logsumexp(-1)  # [N, 2^m]
    drawn = group.new_zeros(len(group), 1)
    passed = {0: drawn[:, 0] - total[:, 0]}
    for count in range(1, size + 1):
        for chosen in combinations(range(size), count):
            mask = sum(1 << i for i in chosen)
            ways = torch.stack([passed[mask ^ (1 << i)] + group[:, i] for i in chosen])
            passed[mask] = ways.logsumexp(0) - total[:, mask]
    return passed[2**size - 1] + total[:, -1]


@cache
def _membership(size: int) -> list[list[bool]]:
    """Which of `size` things are in each of their sets; bit i of a set's number is thing i."""
    return [[bool(mask >> i & 1) for i in range(size)] for mask in range(2**size)]
