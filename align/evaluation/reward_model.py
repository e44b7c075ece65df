"""Diagnostics of a reward model: figures that show whether to trust it, written to `reward/` when the stage ends."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from align.data.examples import TokenizedPreference
from align.evaluation.subsets import subset_figures
from align.runtime.atomic_files import write_json
from align.supervised.reward_objective import flatten_responses
from policies.batching import collate, collate_shared_prompts
from policies.text.tokenization import prompt_text
from rewards import diagnostics as figures
from rewards.diagnostics import Comparison, LengthModel
from rewards.model import RewardModel
from rewards.preferences import OVERALL, Ranking, Rating

DIAGNOSTICS = "diagnostics.json"
WORST = "worst.jsonl"
RELIABILITY = "reliability.png"
MAX_PROBED = 32
"""Largest number of responses whose invariance is measured: each is also scored alone, which is slow."""
MAX_WORST = 20
"""Largest number of errors that are kept in full: as many as a person reads."""
EXTRA_TOKENS = 16
"""How many tokens longer than the longest example the long sequence is, beside which examples are scored."""


def compute_diagnostics(
    preferences: Sequence[TokenizedPreference],
    scores: Tensor,
    weights: Mapping[str, float],
    trained: Sequence[TokenizedPreference] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare a reward model's scores with preferences.

    Args:
        preferences: Held-out preference examples.
        scores: `[members, N, A]`, by attribute, of all N responses of the examples in order, on the scale of training.
            The figures are those of the ensemble's mean.
        weights: Weights of the A attributes in the overall score.
        trained: The training examples, to which the length baseline is fitted.

    Returns:
        The figures of `diagnostics.json`, and the worst errors in full.
    """
    comparisons = figures.comparisons([preference.example for preference in preferences])
    starts = _starts(preferences)
    facts: dict[str, Any] = {"rows": len(preferences)} | _correlations(preferences, scores.mean(0), weights, starts)
    facts |= subset_figures(preferences, _by_attribute(scores.mean(0, keepdim=True), weights)[0][OVERALL])
    if not comparisons:
        return facts, []
    differences = [_differences(comparisons, member, starts) for member in _by_attribute(scores, weights)]
    members = torch.stack(differences)  # [members, M]
    difference = members.mean(0)  # [M]
    facts |= _comparison_figures(comparisons, difference, preferences, trained)
    if len(members) > 1:
        clusters = _clusters(comparisons)
        facts["members"] = [figures.accuracy(member, clusters).accuracy for member in members]
        facts["agreement"] = figures.agreement(members)
    return facts, _worst_errors(comparisons, difference, preferences)


def _comparison_figures(
    comparisons: Sequence[Comparison],
    difference: Tensor,
    preferences: Sequence[TokenizedPreference],
    trained: Sequence[TokenizedPreference],
) -> dict[str, Any]:
    """Accuracy, calibration and baselines of score differences `[M]`, better minus worse."""
    clusters = _clusters(comparisons)
    certainty = _tensor(comparison.certainty for comparison in comparisons)
    margin = _tensor(comparison.margin for comparison in comparisons)
    lengths = _lengths(comparisons, preferences)
    reliability = figures.reliability(difference)
    facts: dict[str, Any] = vars(figures.accuracy(difference, clusters)) | {
        "log_loss": figures.log_loss(difference, certainty),
        "brier": figures.brier(difference, certainty),
        "calibration_error": figures.calibration_error(reliability),
        "reliability": reliability,
        "by_length_difference": figures.accuracy_by(lengths[:, 0] - lengths[:, 1], difference, clusters),
        "baselines": _baselines(lengths, clusters, trained),
    }
    if bool((certainty < 1).any()):
        facts["ceiling"] = float(certainty.mean())
    if margin.any():
        facts["by_margin"] = figures.accuracy_by(margin, difference, clusters)
    return facts


def invariance(model: RewardModel, preferences: Sequence[TokenizedPreference], tokens: int) -> dict[str, float]:
    """Measure how much scores depend on how they are computed.

    Args:
        model: The reward model.
        preferences: Preference examples, of which the first are used.
        tokens: Largest number of tokens per microbatch.

    Returns:
        The largest difference from scoring each response alone: in a microbatch, beside a long sequence, and after a
        prompt shared with other responses, where the model supports it.
    """
    preferences = _first_responses(preferences, MAX_PROBED)
    if not preferences:
        return {}
    prompts, responses = flatten_responses(preferences)
    alone = model.attribute_scores(prompts, responses, 1)
    scores = {"batched": model.attribute_scores(prompts, responses, tokens)}
    with torch.no_grad():
        scores["beside_a_long_row"] = _scores_beside_long(model, prompts, responses)
        if model.trunk.supports_shared_prompts(model.role):
            scores["shared"] = _scores_after_shared_prompts(model, preferences)
    return {name: float((variant - alone).abs().max()) for name, variant in scores.items()}


def _first_responses(preferences: Sequence[TokenizedPreference], limit: int) -> Sequence[TokenizedPreference]:
    """The first examples, with at most `limit` responses between them."""
    totals = accumulate(len(preference.responses_ids) for preference in preferences)
    return preferences[: sum(total <= limit for total in totals)]


def _scores_after_shared_prompts(model: RewardModel, preferences: Sequence[TokenizedPreference]) -> Tensor:
    """Scores `[N, A]` of the responses, those to one prompt in one sequence."""
    device = model.trunk.causal.device
    prompts = [preference.prompt_ids for preference in preferences]
    batch = collate_shared_prompts(prompts, [preference.responses_ids for preference in preferences])
    scores = model.scores_shared_prompts(
        ids=batch.ids.to(device),
        positions=batch.positions.to(device),
        attention_mask=batch.attention_mask.to(device),
        last=batch.last.to(device),
    )
    return scores.cpu()


def _scores_beside_long(
    model: RewardModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Scores `[N, A]` of the responses in one batch with a sequence that is longer than any of theirs."""
    causal = model.trunk.causal
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    longer = longest + EXTRA_TOKENS
    limit = getattr(causal.config.get_text_config(), "max_position_embeddings", None) or longer
    long_prompt = [0] * max(longest, min(longer, limit))
    batch = collate([long_prompt, *prompts], [[], *responses]).to(causal.device)
    return model(batch)[1:].cpu()


def write_diagnostics(folder: Path, facts: Mapping[str, Any], worst_errors: Sequence[Mapping[str, Any]]) -> None:
    """Write figures, worst errors and the reliability plot to a folder.

    Args:
        folder: The folder, which exists.
        facts: The figures from `compute_diagnostics`.
        worst_errors: The worst errors from `compute_diagnostics`.
    """
    write_json(folder / DIAGNOSTICS, facts)
    lines = [json.dumps(error, ensure_ascii=False) + "\n" for error in worst_errors]
    (folder / WORST).write_text("".join(lines), encoding="utf-8")
    if "reliability" in facts:
        judged = "steps" if "labelled_steps" in facts else "comparisons"
        _draw_reliability(facts["reliability"], f"held-out {judged}", folder / RELIABILITY)


def _clusters(comparisons: Sequence[Comparison]) -> list[int]:
    return [comparison.cluster for comparison in comparisons]


def _tensor(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _starts(preferences: Sequence[TokenizedPreference]) -> list[int]:
    """The index of each example's first response among all responses."""
    counts = [len(preference.responses_ids) for preference in preferences]
    return list(accumulate(counts, initial=0))


def _by_attribute(scores: Tensor, weights: Mapping[str, float]) -> list[dict[str, Tensor]]:
    """Each member's scores `[N]` float64 by attribute, and their weighted sum as `OVERALL`."""
    scores = scores.double()
    overall = scores @ torch.tensor([*weights.values()], dtype=torch.float64)  # [members, N]
    members = []
    for member, total in zip(scores, overall, strict=True):
        attributes = {name: member[:, i] for i, name in enumerate(weights)}
        members.append(attributes | {OVERALL: total})
    return members


def _differences(comparisons: Sequence[Comparison], scores: Mapping[str, Tensor], starts: Sequence[int]) -> Tensor:
    """Score of the better response minus that of the worse one, `[M]` float64."""
    differences = []
    for comparison in comparisons:
        attribute_scores = scores.get(comparison.attribute, scores[OVERALL])
        better_example, better = comparison.better
        worse_example, worse = comparison.worse
        better_score = attribute_scores[starts[better_example] + better]
        differences.append(better_score - attribute_scores[starts[worse_example] + worse])
    return torch.stack(differences)


def _lengths(comparisons: Sequence[Comparison], preferences: Sequence[TokenizedPreference]) -> Tensor:
    """Tokens `[M, 2]` float64 of the better and of the worse response."""

    def length(response: tuple[int, int]) -> int:
        example, index = response
        return len(preferences[example].responses_ids[index])

    lengths = [[length(comparison.better), length(comparison.worse)] for comparison in comparisons]
    return torch.tensor(lengths, dtype=torch.float64).reshape(-1, 2)


def _baselines(lengths: Tensor, clusters: Sequence[int], trained: Sequence[TokenizedPreference]) -> dict[str, Any]:
    """Accuracy of two rewards that see only the length: longer is better, and a fit to the training examples."""
    baselines = {"longer": vars(figures.accuracy(lengths[:, 0] - lengths[:, 1], clusters))}
    if comparisons := figures.comparisons([preference.example for preference in trained]):
        better, worse = _lengths(comparisons, trained).unbind(-1)
        length_score = LengthModel(better, worse)
        difference = length_score(lengths[:, 0]) - length_score(lengths[:, 1])
        baselines["fitted_to_length"] = vars(figures.accuracy(difference, clusters))
    return baselines


def _correlations(
    preferences: Sequence[TokenizedPreference], scores: Tensor, weights: Mapping[str, float], starts: Sequence[int]
) -> dict[str, Any]:
    """Spearman's correlation of scores `[N, A]` with ratings, by attribute, and its mean with the ranks of rankings."""
    by_attribute = _by_attribute(scores[None], weights)[0]
    facts: dict[str, Any] = {}
    if correlations := _ranking_correlations(preferences, by_attribute, starts):
        facts["rank_correlation"] = sum(correlations) / len(correlations)
    for attribute, pairs in _rated_scores(preferences, by_attribute, starts).items():
        predicted, ratings = zip(*pairs, strict=True)
        if len(set(ratings)) > 1 and len(set(predicted)) > 1:
            name = f"rating_correlation.{attribute}" if attribute else "rating_correlation"
            facts[name] = figures.rank_correlation(predicted, ratings)
    return facts


def _ranking_correlations(
    preferences: Sequence[TokenizedPreference], scores: Mapping[str, Tensor], starts: Sequence[int]
) -> list[float]:
    """The correlation of each ranking's ranks with the scores, where neither are all equal."""
    correlations = []
    for preference, start in zip(preferences, starts, strict=False):
        example = preference.example
        if not isinstance(example.preference, Ranking) or len(example.preference.sizes) < 2:
            continue
        ranks: list[int] = []
        for rank, size in enumerate(example.preference.sizes):
            ranks += [-rank] * size
        predicted = scores.get(example.attribute, scores[OVERALL])[start : start + len(ranks)].tolist()
        if len(set(predicted)) > 1:
            correlations.append(figures.rank_correlation(predicted, ranks))
    return correlations


def _rated_scores(
    preferences: Sequence[TokenizedPreference], scores: Mapping[str, Tensor], starts: Sequence[int]
) -> dict[str, list[tuple[float, float]]]:
    """Score and rating of each rated response, by attribute."""
    rated: dict[str, list[tuple[float, float]]] = {}
    for preference, start in zip(preferences, starts, strict=False):
        if isinstance(preference.example.preference, Rating):
            for attribute, rating in preference.example.preference.values.items():
                score = float(scores.get(attribute, scores[OVERALL])[start])
                rated.setdefault(attribute, []).append((score, rating))
    return rated


def _worst_errors(
    comparisons: Sequence[Comparison], difference: Tensor, preferences: Sequence[TokenizedPreference]
) -> list[dict[str, Any]]:
    """The comparisons that the scores get most wrong, worst first, with their texts."""
    errors = []
    for index in difference.argsort()[:MAX_WORST].tolist():
        if difference[index] < 0:
            errors.append({"difference": float(difference[index])} | _texts(comparisons[index], preferences))
    return errors


def _texts(comparison: Comparison, preferences: Sequence[TokenizedPreference]) -> dict[str, Any]:
    better_example, better = comparison.better
    worse_example, worse = comparison.worse
    example = preferences[better_example].example
    other = preferences[worse_example].example
    texts = {
        "prompt": prompt_text(example.prompt),
        "better": example.responses[better],
        "worse": other.responses[worse],
    }
    if better_example != worse_example:
        texts["prompt_of_worse"] = prompt_text(other.prompt)
    if comparison.attribute:
        texts["attribute"] = comparison.attribute
    return texts


def _draw_reliability(bins: Sequence[Mapping[str, float]], label: str, path: Path) -> None:
    figure = Figure(figsize=(4, 4), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle="--", label="perfectly calibrated")
    confidences = [interval["confidence"] for interval in bins]
    accuracies = [interval["accuracy"] for interval in bins]
    total = sum(interval["pairs"] for interval in bins)
    sizes = [12 + 200 * interval["pairs"] / total for interval in bins]
    axes.plot(confidences, accuracies, linewidth=1)
    axes.scatter(confidences, accuracies, s=sizes, label=label)
    axes.set(title="Reliability of the reward model", xlabel="confidence", ylabel="share judged right")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
