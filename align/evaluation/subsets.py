"""Accuracy by the subsets of a benchmark of reward models, such as RewardBench 1 and 2."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align.data.examples import TokenizedPreference
from rewards.diagnostics import wilson
from rewards.preferences import Pair, PreferenceExample, Ranking


def subset_figures(preferences: Sequence[TokenizedPreference], scores: Tensor) -> dict[str, Any]:
    """Accuracy by subset: the share of examples whose every better response scores higher than all others.

    With one better response this is RewardBench's accuracy (Lambert et al. 2024), and the best-of-4 accuracy of
    RewardBench 2 (Malik et al. 2025); equal scores are errors. In the subset Ties of the latter, several responses are
    right: all of them must score higher than all wrong ones.

    Args:
        preferences: The examples.
        scores: Overall scores `[N]` of all their responses in order.

    Returns:
        `subsets`, the fields of an `Accuracy` with Wilson's interval by subset, and `subset_mean`, the mean of their
        accuracies; empty where no example has a subset.
    """
    right: dict[str, list[bool]] = {}
    start = 0
    for preference in preferences:
        example = preference.example
        end = start + len(example.responses)
        better = _better_count(example)
        if example.subset and better:
            margin = scores[start : start + better].min() - scores[start + better : end].max()
            right.setdefault(example.subset, []).append(bool(margin > 0))
        start = end
    if not right:
        return {}
    accuracies = {name: wilson(sum(results) / len(results), len(results)) for name, results in right.items()}
    mean = torch.tensor([accuracy.accuracy for accuracy in accuracies.values()], dtype=torch.float64).mean()
    return {"subsets": {name: vars(accuracy) for name, accuracy in accuracies.items()}, "subset_mean": float(mean)}


def _better_count(example: PreferenceExample) -> int:
    """How many responses, the first ones, are better than all others; 0 where the example does not say so."""
    preference = example.preference
    if isinstance(preference, Pair):
        return int(preference.certainty > 0.5)
    if isinstance(preference, Ranking) and len(preference.sizes) > 1:
        return preference.sizes[0]
    return 0
