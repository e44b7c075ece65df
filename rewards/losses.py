"""Losses of reward models: pure functions of scores."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor) -> Tensor:
    """Negative log-likelihood of each pair, in nats.

    chosen, rejected: scores `[N]` float. margin: `[N]`, how far the chosen score should lie above (Touvron et al.
    2023, "Llama 2", eq. 2; 0: no demand). preference: `[N]`, the probability that the label is right: 1 for a clear
    preference, ½ for a tie, 1 - ε with labels smoothed by ε. Result `[N]`:

        -p log σ(c - r - m) - (1 - p) log σ(-(c - r - m))        Bradley and Terry (1952); Ouyang et al. 2022, eq. 1
    """
    difference = chosen - rejected - margin
    return -preference * logsigmoid(difference) - (1 - preference) * logsigmoid(-difference)


def regression_loss(expected: Tensor, ratings: Tensor) -> Tensor:
    """Half the squared error `[N]`: the negative log-likelihood under noise of deviation 1, but for a constant."""
    return (expected - ratings).square() / 2


def ordinal_loss(scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Negative log-likelihood of ordered levels, in nats.

    scores `[N]`; levels `[N]` int64 from 0; thresholds `[L - 1]`, rising. P(level ≤ k) = σ(θ_k - s): the proportional
    odds model (McCullagh 1980, "Regression models for ordinal data"). Result `[N]`.

    With a = θ_k - s and b = θ_{k-1} - s it is -log(σ(a) - σ(b)) = -log σ(a) - log σ(-b) - log(1 - exp(b - a)).
    """
    middle = thresholds[1:] - thresholds[:-1]
    ends = thresholds.new_full((1,), torch.inf)
    between = -torch.log(-torch.expm1(-torch.cat([ends, middle, ends])))  # by level; 0 at both ends
    above = torch.cat([thresholds, ends])[levels] - scores
    below = torch.cat([-ends, thresholds])[levels] - scores
    return between[levels] - logsigmoid(above) - logsigmoid(-below)


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs in the right order, equal scores counted half. Scores `[N]`; result is a scalar."""
    if not len(chosen):
        return torch.tensor(0.0)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()
