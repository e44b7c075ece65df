"""Losses of reward models: pure functions of scores."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, preference: Tensor) -> Tensor:
    """Negative log-likelihood of pairwise preferences.

        -p log σ(c - r - m) - (1 - p) log σ(-(c - r - m))        Bradley and Terry (1952); Ouyang et al. 2022, eq. 1

    Args:
        chosen: Scores c `[N]` float.
        rejected: Scores r `[N]` float.
        margin: m `[N]`: how far the chosen score should be above the other (Touvron et al. 2023, "Llama 2", eq. 2);
            0: no margin.
        preference: p `[N]`: the probability that the label is right; 1 for a clear preference, ½ for a tie, 1 - ε with
            labels smoothed by ε.

    Returns:
        Losses `[N]`, in nats.
    """
    difference = chosen - rejected - margin
    return -preference * logsigmoid(difference) - (1 - preference) * logsigmoid(-difference)


def regression_loss(expected: Tensor, ratings: Tensor) -> Tensor:
    """Half the squared error: up to a constant, the negative log-likelihood under noise of standard deviation 1.

    Args:
        expected: Predicted ratings `[N]` float.
        ratings: Ratings `[N]` float, standardised.

    Returns:
        Losses `[N]`, in nats.
    """
    return (expected - ratings).square() / 2


def ordinal_loss(scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Negative log-likelihood of ordered levels under the proportional odds model.

    P(level ≤ k) = σ(θ_k - s) (McCullagh 1980, "Regression models for ordinal data"). With a = θ_k - s and
    b = θ_{k-1} - s the loss is -log(σ(a) - σ(b)) = -log σ(a) - log σ(-b) - log(1 - exp(b - a)).

    Args:
        scores: s `[N]` float.
        levels: k `[N]` int64, from 0.
        thresholds: θ `[L - 1]` float, increasing, for L levels.

    Returns:
        Losses `[N]`, in nats.
    """
    widths = thresholds[1:] - thresholds[:-1]  # [L - 2]
    ends = thresholds.new_full((1,), torch.inf)
    between = -torch.log(-torch.expm1(-torch.cat([ends, widths, ends])))  # [L]; 0 for the first and the last level
    above = torch.cat([thresholds, ends])[levels] - scores  # [N]
    below = torch.cat([-ends, thresholds])[levels] - scores  # [N]
    return between[levels] - logsigmoid(above) - logsigmoid(-below)


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of the labels of steps (Lightman et al. 2023; Wang et al. 2024, "Math-Shepherd").

    With probabilities as labels, such as the share of continuations from a step that reach the answer, the minimum is
    at these probabilities.

    Args:
        logits: z `[S]` float; σ(z) is the predicted probability that a step is right.
        labels: y `[S]` float, from 0 to 1.

    Returns:
        Losses `[S]`, -y log σ(z) - (1 - y) log σ(-z), in nats.
    """
    return -labels * logsigmoid(logits) - (1 - labels) * logsigmoid(-logits)


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Share of pairs in the right order; equal scores count half.

    Args:
        chosen: Scores `[N]`.
        rejected: Scores `[N]`.

    Returns:
        A scalar, float64; 0 for no pairs.
    """
    if not len(chosen):
        return torch.tensor(0.0)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean()
