"""Measure how many annotated prompts a reward needs if annotators give rankings of four, or pairs.

    python experiments/reward_models/rankings.py

Responses are feature vectors, the true utility is linear in them, and annotators rank four responses to a prompt by the
Plackett-Luce model. A linear reward is fitted by maximum likelihood to the rankings, to one random pair of each, and to
all six pairs of each. Prints the number of prompts that each needs for the same accuracy on held-out pairs, and draws
`docs/images/rankings.png`.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rewards.diagnostics import rank_correlation
from rewards.objective import PreferenceLoss
from rewards.preferences import Pair, PreferenceExample, Ranking

FEATURES = 16
K = 4
"""Responses per prompt."""
SCALE = 1.0
"""Standard deviation of the true utilities; annotators order two random responses correctly in two of three cases."""
PROMPTS = (25, 50, 100, 200, 400, 800, 1600, 3200)
ACCURACY = 0.95
"""Target share of held-out pairs that the fitted reward puts in the order of the true utilities."""
HELDOUT_PAIRS = 20_000

RANKING_EXAMPLE = PreferenceExample("", ("",) * K, Ranking((1,) * K))
PAIR_EXAMPLE = PreferenceExample("", ("", ""), Pair())

Choose = Callable[[Tensor, torch.Generator], Tensor]
"""From ranked features `[N, K, F]`, best first, to comparisons `[M, 2 or K, F]` for training."""


def main() -> None:
    """Measure, print the results and plot them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--to", type=Path, default=Path("docs/images/rankings.png"))
    arguments = parser.parse_args()
    curves: dict[str, list[list[float]]] = {}
    needed: dict[str, float] = {}
    for name, choose in KINDS.items():
        curves[name] = accuracies(choose, arguments.seeds)
        needed[name] = prompts_for(ACCURACY, [mean(accuracy) for accuracy in curves[name]])
        points = zip(PROMPTS, curves[name], strict=True)
        shown = "  ".join(f"{count}: {mean(values):.4f} ± {error(values):.4f}" for count, values in points)
        print(f"{name:18s} needs {needed[name]:6.0f} prompts for {ACCURACY:.0%}   {shown}")
    ranking = needed["rankings of four"]
    print(
        f"rankings need {ranking / needed['one pair']:.2f} of the prompts of one pair each, "
        f"{ranking / needed['all six pairs']:.2f} of those of all six"
    )
    print(f"rank correlation with the true utilities at {PROMPTS[-1]} rankings: {recovered_correlation(0):.4f}")
    draw(curves, arguments.to)


def accuracies(choose: Choose, seeds: int) -> list[list[float]]:
    """The accuracy for each number of prompts and seed."""
    curve = []
    for prompts in PROMPTS:
        curve.append([measure(choose, prompts, seed) for seed in range(seeds)])
    return curve


def measure(choose: Choose, prompts: int, seed: int) -> float:
    """Held-out accuracy of a reward that is fitted to this number of prompts."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    truth *= SCALE / truth.norm()
    comparisons = choose(rank_responses(truth, prompts, generator), generator)
    fitted = fit(comparisons)
    first, second = torch.randn(2, HELDOUT_PAIRS, FEATURES, generator=generator, dtype=torch.float64)
    true_order = ((first - second) @ truth).sign()
    fitted_order = ((first - second) @ fitted).sign()
    return float((fitted_order == true_order).double().mean())


def recovered_correlation(seed: int) -> float:
    """Spearman's correlation of fitted and true utilities, for the largest number of rankings."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    truth *= SCALE / truth.norm()
    fitted = fit(rank_responses(truth, PROMPTS[-1], generator))
    unseen = torch.randn(HELDOUT_PAIRS, FEATURES, generator=generator, dtype=torch.float64)
    return rank_correlation((unseen @ fitted).tolist(), (unseen @ truth).tolist())


def rank_responses(truth: Tensor, prompts: int, generator: torch.Generator) -> Tensor:
    """Features `[N, K, F]`, ranked by utility plus Gumbel noise: the Plackett-Luce model (Yellott 1977)."""
    features = torch.randn(prompts, K, FEATURES, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(torch.rand(prompts, K, generator=generator, dtype=torch.float64)))
    order = (features @ truth + noise).argsort(-1, descending=True)  # [N, K]
    return features.gather(1, order[..., None].expand_as(features))


def fit(comparisons: Tensor) -> Tensor:
    """Maximum-likelihood weights `[F]` of comparisons `[M, 2 or K, F]`; a small ridge penalty makes them finite."""
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    example = PAIR_EXAMPLE if comparisons.shape[1] == 2 else RANKING_EXAMPLE
    examples = [example] * len(comparisons)
    loss = PreferenceLoss([example], {"": 1.0}, "regression").double()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = (comparisons @ weights).flatten()[:, None]
        value = loss(scores, examples).sum() + 0.05 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


def one_pair(ranked: Tensor, generator: torch.Generator) -> Tensor:
    """Two random responses of each prompt."""
    two = torch.rand(ranked.shape[:2], generator=generator).argsort(-1)[:, :2].sort(-1).values
    return ranked.gather(1, two[..., None].expand(-1, -1, ranked.shape[-1]))


def six_pairs(ranked: Tensor, generator: torch.Generator) -> Tensor:
    """All pairs of each prompt's responses."""
    return torch.cat([ranked[:, list(pair)] for pair in combinations(range(K), 2)])


def rankings(ranked: Tensor, generator: torch.Generator) -> Tensor:
    """The rankings themselves."""
    return ranked


KINDS: dict[str, Choose] = {"rankings of four": rankings, "all six pairs": six_pairs, "one pair": one_pair}


def prompts_for(accuracy: float, reached: Sequence[float]) -> float:
    """The number of prompts at which the curve crosses an accuracy, interpolated linearly over log prompts."""
    logs = torch.tensor(PROMPTS, dtype=torch.float64).log2().tolist()
    for i in range(1, len(reached)):
        if reached[i] >= accuracy > reached[i - 1]:
            share = (accuracy - reached[i - 1]) / (reached[i] - reached[i - 1])
            return 2 ** (logs[i - 1] + share * (logs[i] - logs[i - 1]))
    return float("nan")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5)


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Plot accuracy against prompts, with standard errors."""
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        means = [mean(values) for values in curve]
        errors = [error(values) for values in curve]
        axes.errorbar(PROMPTS, means, errors, marker="o", markersize=3, label=name)
    axes.axhline(ACCURACY, color="grey", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="prompts", ylabel="held-out accuracy", title="What an annotated prompt is worth")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
