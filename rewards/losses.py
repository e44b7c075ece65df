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


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs in the right order, equal scores counted half. Scores `[N]`; result is a scalar."""
    if not len(chosen):
        return torch.tensor(0.0)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()
