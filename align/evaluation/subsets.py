"""Accuracy by the subsets of a benchmark of reward models, such as RewardBench 1 and 2."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from align.data.examples import TokenizedPreference
from align.evaluation.ties import paired, ties_figures
from rewards.diagnostics import wilson
from rewards.preferences import Pair, PreferenceExample, Ranking

TIES_IDS = ("ref:", "tied:")
"""What the ids of pairs begin with: of the prompt with one right response, and of that with several."""


def subset_figures(preferences: Sequence[TokenizedPreference], scores: Tensor) -> dict[str, Any]:
    """Accuracy by subset: the share of examples whose every better response scores higher than all others.

    With one better response this is RewardBench's accuracy (Lambert et al. 2024), and the best-of-4 accuracy of
    RewardBench 2 (Malik et al. 2025); equal scores are errors. In the subset Ties of the latter, several responses are
    right: all of them must score higher than all wrong ones. Its prompts have ids in pairs, and a weighted score, which
    also compares margins.

    Args:
        preferences: The examples.
        scores: Overall scores `[N]` of all their responses in order.

    Returns:
        `subsets`, the fields of an `Accuracy` with Wilson's interval by subset; where there are such pairs `ties`, see
        `ties_figures`; and `subset_mean`, the mean of the accuracies, but of this score for the subset of the pairs.
        Empty where no example has a subset.
    """
    right: dict[str, list[bool]] = {}
    ties: dict[str, tuple[list[float], list[float]]] = {}
    ties_subset = ""
    start = 0
    for preference in preferences:
        example = preference.example
        end = start + len(example.responses)
        better = _better_count(example)
        if example.subset and better:
            best = scores[start : start + better].tolist()
            others = scores[start + better : end].tolist()
            right.setdefault(example.subset, []).append(min(best) > max(others))
            if example.row_id.startswith(TIES_IDS):
                ties[example.row_id] = (best, others)
                ties_subset = example.subset
        start = end
    if not right:
        return {}
    accuracies = {name: wilson(sum(results) / len(results), len(results)) for name, results in right.items()}
    figures: dict[str, Any] = {"subsets": {name: vars(accuracy) for name, accuracy in accuracies.items()}}
    by_subset = {name: accuracy.accuracy for name, accuracy in accuracies.items()}
    if pairs := paired(ties):
        figures["ties"] = ties_figures(pairs)
        by_subset[ties_subset] = figures["ties"]["score"]
    return figures | {"subset_mean": fmean(by_subset.values())}


def _better_count(example: PreferenceExample) -> int:
    """How many responses, the first ones, are better than all others; 0 where the example does not say so."""
    preference = example.preference
    if isinstance(preference, Pair):
        return int(preference.certainty > 0.5)
    if isinstance(preference, Ranking) and len(preference.sizes) > 1:
        return preference.sizes[0]
    return 0
