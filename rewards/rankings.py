"""Likelihoods of rankings of K responses, with and without ties: pure functions of scores.

The worth of a response is exp(score). Scores `[N, K]` are in rank order, best first; `sizes` are those of the groups of
equal rank, in the same order: (1, 2, 1) is a first, two tied for the second rank, and a last. Losses `[N]` are in nats.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate, combinations

import torch
from torch import Tensor

LOG_ZERO = -1e30
"""Log of a weight of zero; finite, since the gradients of -inf are NaN."""

MAX_ITERATIONS = 10_000
"""Far more than the tie parameters need to converge."""

MAX_OPEN_TIE = 10
"""Largest group of unknown order: the sum over its subsets has 2 to the power of its size terms."""


def plackett_luce_loss(scores: Tensor) -> Tensor:
    """Negative log-likelihood of a strict ranking: the best is chosen from all, the next from the remaining ones.

        Σ_k  log Σ_{j ≥ k} exp(s_j) - s_k                       Plackett (1975); Luce (1959); K = 2: Bradley and Terry

    Args:
        scores: s `[N, K]` float, best first.

    Returns:
        Losses `[N]`, in nats.
    """
    return (scores.flip(-1).logcumsumexp(-1).flip(-1) - scores).sum(-1)


def davidson_luce_loss(scores: Tensor, sizes: Sequence[int], log_ties: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking whose ties are judgements that the responses are equally good.

    For each rank a set T of the remaining responses is chosen, with up to D members and the weight δ_|T| · (geometric
    mean of the worths of T), normalised over all such sets (Firth, Kosmidis and Turner 2019, "Davidson-Luce model for
    multi-item choice with ties", eq. 3). D = 1 is Plackett and Luce's model; K = 2 with D = 2 is Davidson's (1970).

    Args:
        scores: `[N, K]` float, best first.
        sizes: Sizes of the groups of equal rank; none is larger than D, and their sum is K.
        log_ties: log δ `[D]` float; the first is 0.

    Returns:
        Losses `[N]`, in nats.
    """
    normalisers = _log_sum_of_sets(scores, log_ties)  # [N, K]
    loss = scores.new_zeros(len(scores))
    for start, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        chosen = log_ties[size - 1] + scores[:, start : start + size].mean(-1)  # [N]
        loss = loss + normalisers[:, start] - chosen
    return loss


def choices(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The choices of which a ranking consists: how many responses there were, and how many of them were chosen.

    The last response alone, which is left over, is no choice.
    """
    made: list[tuple[int, int]] = []
    remaining = sum(sizes)
    for size in sizes:
        if remaining > 1:
            made.append((remaining, size))
        remaining -= size
    return made


def ties_of_equal_worths(chosen: Sequence[float], remaining: Mapping[int, int]) -> list[float]:
    """The most likely δ if all worths are equal: of n responses, sets of t are then chosen with odds δ_t · C(n, t).

    Iterates δ_t = chosen_t / Σ_n remaining_n · C(n, t) / Σ_s δ_s · C(n, s), scaled to δ_1 = 1, to convergence, which is
    minorization-maximization as in Hunter 2004, "MM algorithms for generalized Bradley-Terry models".

    Args:
        chosen: How often a set of 1 to D responses was chosen `[D]`; positive where a set of this size was possible.
        remaining: How often there were n responses to choose from, by n.

    Returns:
        δ `[D]`; the first is 1, as are those of sizes that were never possible.
    """
    largest = len(chosen)
    delta = [1.0] * largest
    for _ in range(MAX_ITERATIONS):
        expected = [0.0] * largest  # over δ
        for available, count in remaining.items():
            sets = [math.comb(available, size) for size in range(1, largest + 1)]
            total = sum(weight * count_of_sets for weight, count_of_sets in zip(delta, sets, strict=True))
            for i in range(largest):
                expected[i] += count * sets[i] / total
        previous = delta
        updated = [chosen[i] / expected[i] if expected[i] else 0.0 for i in range(largest)]
        delta = [value / updated[0] if value else 1.0 for value in updated]
        if all(math.isclose(new, old, rel_tol=1e-9) for new, old in zip(delta, previous, strict=True)):
            break
    return delta


def _log_sum_of_sets(scores: Tensor, log_ties: Tensor) -> Tensor:
    """For each position `[N, K]`, the log of the summed weights of all sets of the responses from there on.

    The sum of the geometric means of all sets of t is the elementary symmetric polynomial e_t of exp(s / t). The table
    holds log e_k of exp(s / t) for t and k from 1, over a suffix that grows by one response at a time.
    """
    largest = len(log_ties)
    roots = torch.arange(1, largest + 1, device=scores.device, dtype=scores.dtype)  # [D]
    one = scores.new_zeros(len(scores), largest, 1)  # log e_0, [N, D, 1]
    table = scores.new_full((len(scores), largest, largest), LOG_ZERO)  # [N, D (t), D (k)]
    sums: list[Tensor] = []
    for score in reversed(scores.unbind(-1)):
        with_score = torch.cat([one, table[..., :-1]], dim=-1) + (score[:, None] / roots)[..., None]  # [N, D, D]
        table = torch.logaddexp(table, with_score)
        sums.append((table.diagonal(dim1=-2, dim2=-1) + log_ties).logsumexp(-1))  # [N]
    return torch.stack(sums[::-1], dim=-1)  # [N, K]


def open_ranking_loss(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Negative log-likelihood of a ranking in which the order within a group is unknown: the sum over all orders.

    Under Plackett and Luce's model, the probability of each group to come before all that follow it, in any order
    (marginal likelihood of a partial ranking; Ma et al. 2021, "Learning-to-rank with partitioned preference"). With the
    best alone in front of one group of all others it is the choice of the best of K.

    Args:
        scores: `[N, K]` float, best first.
        sizes: Sizes of the groups; only the last may be larger than `MAX_OPEN_TIE`, and their sum is K.

    Returns:
        Losses `[N]`, in nats.
    """
    loss = scores.new_zeros(len(scores))
    for start, size in zip(accumulate(sizes, initial=0), sizes[:-1], strict=False):
        group = scores[:, start : start + size]  # [N, size]
        rest = scores[:, start + size :].logsumexp(-1)  # [N]
        loss = loss - _log_first(group, rest)
    return loss


def _log_first(group: Tensor, rest: Tensor) -> Tensor:
    """Log-probability `[N]` that all of a group `[N, m]` are drawn before any of the rest, of log-worth `[N]`.

    Dynamic programming over the subsets that have been drawn, from the empty one: the last to be drawn was any member
    of the subset. Every term is positive, so there is no cancellation.
    """
    size = group.shape[-1]
    members = torch.tensor(_membership(size), device=group.device)  # [2^m, m]
    remaining = torch.where(members, LOG_ZERO, group[:, None])  # [N, 2^m, m]: log-worths not drawn yet, per subset
    total = torch.cat([remaining, rest[:, None, None].expand(-1, 2**size, 1)], dim=-1).logsumexp(-1)  # [N, 2^m]
    drawn = group.new_zeros(len(group), 1)
    reached = {0: drawn[:, 0] - total[:, 0]}
    for count in range(1, size + 1):
        for chosen in combinations(range(size), count):
            subset = sum(1 << i for i in chosen)
            ways = torch.stack([reached[subset ^ (1 << i)] + group[:, i] for i in chosen])  # [count, N]
            reached[subset] = ways.logsumexp(0) - total[:, subset]
    return reached[2**size - 1] + total[:, -1]


@cache
def _membership(size: int) -> list[list[bool]]:
    """For each subset of `size` members, by its number, which are in it: bit i of the number stands for member i."""
    subsets: list[list[bool]] = []
    for subset in range(2**size):
        subsets.append([bool(subset >> i & 1) for i in range(size)])
    return subsets
