"""What a ranking of four is worth, where the truth is known: prompts needed for an accuracy, beside pairs.

    python experiments/feedback/rankings.py

Responses have features, the true utility is linear in them, and annotators rank four responses to a prompt by Plackett
and Luce's model. A linear reward is fitted by maximum likelihood to the rankings, to one random pair of each, and to
all six pairs of each. Prints the prompts that each needs for the same accuracy on held-out pairs, and draws
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

FEATURES, K = 16, 4
SCALE = 1.0
"""Deviation of the true utilities: two random responses are told apart in two of three cases."""
PROMPTS = (25, 50, 100, 200, 400, 800, 1600, 3200)
ACCURACY = 0.95
"""Share of held-out pairs that is put in the order of the true utilities."""
HELDOUT = 20_000

RANKED = [PreferenceExample("", ("",) * K, Ranking((1,) * K))]
PAIRED = [PreferenceExample("", ("", ""), Pair())]

Choose = Callable[[Tensor, torch.Generator], Tensor]
"""From ranked features `[N, K, F]`, best first, to the comparisons `[M, 2 or K, F]` that are learned from."""


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--to", type=Path, default=Path("docs/images/rankings.png"))
    arguments = parser.parse_args()
    curves = {
        name: [[measure(choose, prompts, seed) for seed in range(arguments.seeds)] for prompts in PROMPTS]
        for name, choose in KINDS.items()
    }
    needed = {name: prompts_for(ACCURACY, [mean(r) for r in rows]) for name, rows in curves.items()}
    for name, rows in curves.items():
        shown = "  ".join(f"{n}: {mean(r):.4f} ± {error(r):.4f}" for n, r in zip(PROMPTS, rows, strict=True))
        print(f"{name:18s} needs {needed[name]:6.0f} prompts for {ACCURACY:.0%}   {shown}")
    ranking = needed["rankings of four"]
    print(
        f"rankings need {ranking / needed['one pair']:.2f} of the prompts of one pair each, "
        f"{ranking / needed['all six pairs']:.2f} of those of all six"
    )
    print(f"rank correlation with the true utilities at {PROMPTS[-1]} rankings: {recovered(0):.4f}")
    draw(curves, arguments.to)


def measure(choose: Choose, prompts: int, seed: int) -> float:
    """Accuracy of a reward fitted to so many prompts."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    truth *= SCALE / truth.norm()
    compared = choose(ranked(truth, prompts, generator), generator)
    fitted = fit(compared)
    first, second = torch.randn(2, HELDOUT, FEATURES, generator=generator, dtype=torch.float64)
    return float((((first - second) @ truth).sign() == ((first - second) @ fitted).sign()).double().mean())


def recovered(seed: int) -> float:
    """Spearman's correlation of fitted and true utilities, with the most rankings."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    truth *= SCALE / truth.norm()
    fitted = fit(ranked(truth, PROMPTS[-1], generator))
    unseen = torch.randn(HELDOUT, FEATURES, generator=generator, dtype=torch.float64)
    return rank_correlation((unseen @ fitted).tolist(), (unseen @ truth).tolist())


def ranked(truth: Tensor, prompts: int, generator: torch.Generator) -> Tensor:
    """Features `[N, K, F]`, ranked by utility plus Gumbel noise, which is Plackett and Luce's model (Yellott 1977)."""
    features = torch.randn(prompts, K, FEATURES, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(torch.rand(prompts, K, generator=generator, dtype=torch.float64)))
    order = (features @ truth + noise).argsort(-1, descending=True)
    return features.gather(1, order[..., None].expand_as(features))


def fit(compared: Tensor) -> Tensor:
    """Weights `[F]` of the greatest likelihood, with a slight ridge so that there is always one."""
    weights = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    row = PAIRED[0] if compared.shape[1] == 2 else RANKED[0]
    feedback, loss = [row] * len(compared), PreferenceLoss([row], {"": 1.0}, "regression")
    loss.double()
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scores = (compared @ weights).flatten()[:, None]
        value = loss(scores, feedback).sum() + 0.05 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


def one_pair(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Two of each prompt's responses at random."""
    two = torch.rand(rows.shape[:2], generator=generator).argsort(-1)[:, :2].sort(-1).values
    return rows.gather(1, two[..., None].expand(-1, -1, rows.shape[-1]))


def six_pairs(rows: Tensor, generator: torch.Generator) -> Tensor:
    return torch.cat([rows[:, list(pair)] for pair in combinations(range(K), 2)])


def whole(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows


KINDS: dict[str, Choose] = {"rankings of four": whole, "all six pairs": six_pairs, "one pair": one_pair}


def prompts_for(accuracy: float, reached: Sequence[float]) -> float:
    """Where the curve crosses an accuracy, on straight lines over the logarithm of the prompts."""
    logs = torch.tensor(PROMPTS, dtype=torch.float64).log2().tolist()
    for i in range(1, len(reached)):
        if reached[i] >= accuracy > reached[i - 1]:
            share = (accuracy - reached[i - 1]) / (reached[i] - reached[i - 1])
            return 2 ** (logs[i - 1] + share * (logs[i] - logs[i - 1]))
    return float("nan")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(torch.tensor(values, dtype=torch.float64).std() / len(values) ** 0.5)


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, rows in curves.items():
        axes.errorbar(PROMPTS, [mean(r) for r in rows], [error(r) for r in rows], marker="o", markersize=3, label=name)
    axes.axhline(ACCURACY, color="grey", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="prompts", ylabel="held-out accuracy", title="What an annotated prompt is worth")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
