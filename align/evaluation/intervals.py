"""95 % confidence intervals of means and shares over independent prompts. Pure functions."""

import math

from scipy.stats import t as student
from torch import Tensor

from rewards.diagnostics import Accuracy, wilson


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """Student's t interval of a mean: mean ± t · s / √n, with t the 97.5 % quantile of n - 1 degrees of freedom.

    Args:
        values: One value per prompt `[n]`; of a comparison, the differences on the same prompts.

    Returns:
        The lower and the upper end; None for fewer than two values.
    """
    count = len(values)
    if count < 2:
        return None
    values = values.double()
    mean = float(values.mean())
    half_width = float(student.ppf(0.975, count - 1)) * float(values.std()) / math.sqrt(count)
    return mean - half_width, mean + half_width


def ratio_interval(totals: Tensor, sizes: Tensor) -> tuple[float, float] | None:
    """Student's t interval of a ratio of sums, R = Σ totals / Σ sizes, such as nats per token of documents.

    The variance is that of the linearised ratio, n / (n - 1) · Σ (totals - R · sizes)² / (Σ sizes)² (Cochran 1977,
    "Sampling techniques", section 6.4).

    Args:
        totals: One total per document, or prompt, `[n]`.
        sizes: The size of each `[n]`; their sum is not 0.

    Returns:
        The lower and the upper end; None for fewer than two documents.
    """
    totals = totals.double()
    sizes = sizes.double()
    ratio = totals.sum() / sizes.sum()
    return mean_interval(ratio + (totals - ratio * sizes) / sizes.mean())  # a mean of R with the linearised variance


def share_interval(values: Tensor) -> Accuracy:
    """Wilson's score interval of a mean of values from 0 to 1, such as wins with ties counted half.

    Values between 0 and 1 vary less than as many trials with two outcomes. The interval is Wilson's for the number of
    trials that would have the variance of the mean, p (1 - p) / (s² / n), the design effect (Kish 1965). For values of
    0 and 1 this number is n.

    Args:
        values: One value per prompt `[n]`, from 0 to 1.
    """
    values = values.double()
    count = len(values)
    share = float(values.mean()) if count else 0.0
    variance = float(values.var(correction=0)) if count else 0.0
    effective = share * (1 - share) / variance * count if variance > 0 else count
    return wilson(share, effective, count)


def with_interval(name: str, values: Tensor) -> dict[str, float]:
    """The mean of values `[n]` under a name, and the ends of its interval under `NAME_low` and `NAME_high`, if any."""
    figures = {name: float(values.double().mean())}
    if ends := mean_interval(values):
        figures |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return figures


def share_with_interval(name: str, values: Tensor) -> dict[str, float]:
    """The same for a share: the mean of values `[n]` from 0 to 1, with Wilson's interval."""
    figures = share_interval(values)
    return {name: figures.accuracy, f"{name}_low": figures.accuracy_low, f"{name}_high": figures.accuracy_high}
