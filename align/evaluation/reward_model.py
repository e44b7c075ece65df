"""What a reward stage ends with: the figures that tell whether to trust its model, in `reward/`."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from align.data.datasets import TokenizedPreference
from align.runtime.atomic_files import write_json
from align.supervised.reward_objective import branches, flat
from policies.batching import collate
from policies.text.tokenization import prompt_text
from rewards import diagnostics as figures
from rewards.diagnostics import Comparison, LengthModel
from rewards.model import RewardModel
from rewards.preferences import OVERALL, Ranking, Rating

DIAGNOSTICS, WORST, RELIABILITY = "diagnostics.json", "worst.jsonl", "reliability.png"
PROBED = 32
"""At most so many responses are scored in several ways."""
SHOWN = 20
"""How many of the worst errors are kept in full."""


def compute_diagnostics(
    preferences: Sequence[TokenizedPreference],
    scores: Tensor,
    weights: Mapping[str, float],
    trained: Sequence[TokenizedPreference] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of `diagnostics.json`, and the worst errors in full.

    scores: `[members, N, A]`, by attribute, of all responses of the cases in order, on the scale of training. What is
    said of an ensemble is said of its mean. trained: the cases of training, to which the length model is fitted.
    """
    compared = figures.comparisons([preference.example for preference in preferences])
    starts = _starts(preferences)
    whole = _by_attribute(scores, weights)
    facts: dict[str, Any] = {"rows": len(preferences)} | _correlations(preferences, scores.mean(0), weights, starts)
    if not compared:
        return facts, []
    members = torch.stack([_differences(compared, own, starts) for own in whole])
    difference = members.mean(0)
    clusters = [each.cluster for each in compared]
    certainty = torch.tensor([each.certainty for each in compared], dtype=torch.float64)
    longer, margin = (
        _lengths(compared, preferences),
        torch.tensor([each.margin for each in compared], dtype=torch.float64),
    )
    rows = figures.reliability(difference)
    facts |= vars(figures.accuracy(difference, clusters)) | {
        "log_loss": figures.log_loss(difference, certainty),
        "brier": figures.brier(difference, certainty),
        "calibration_error": figures.calibration_error(rows),
        "reliability": rows,
        "by_length_difference": figures.accuracy_by(longer[:, 0] - longer[:, 1], difference, clusters),
        "baselines": _baselines(longer, clusters, trained),
    }
    if margin.any():
        facts["by_margin"] = figures.accuracy_by(margin, difference, clusters)
    if len(members) > 1:
        facts["members"] = [figures.accuracy(own, clusters).accuracy for own in members]
        facts["agreement"] = figures.agreement(members)
    worst = difference.argsort()[:SHOWN].tolist()
    return facts, [_in_full(compared[i], preferences, float(difference[i])) for i in worst if difference[i] < 0]


def invariance(model: RewardModel, preferences: Sequence[TokenizedPreference], tokens: int) -> dict[str, float]:
    """How far the same responses' scores lie apart: in batches, alone, beside a long row, behind one prompt."""
    counts = accumulate(len(preference.responses_ids) for preference in preferences)
    preferences = preferences[: sum(1 for _ in takewhile(lambda count: count <= PROBED, counts))]
    if not preferences:
        return {}
    prompts, responses = flat(preferences)
    alone = model.attribute_scores(prompts, responses, 1)
    found = {"batched": model.attribute_scores(prompts, responses, tokens)}
    device, longest = model.trunk.causal.device, max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    with torch.no_grad():
        most = getattr(model.trunk.causal.config.get_text_config(), "max_position_embeddings", None) or longest + 16
        beside = collate([[0] * max(longest, min(longest + 16, most)), *prompts], [[], *responses]).to(device)
        found["beside_a_long_row"] = model(beside)[1:].cpu()
        if model.trunk.supports_shared_prompts(model.role):
            batch = branches(list(preferences))
            places = {name: batch[name].to(device) for name in ("ids", "last", "positions", "seen")}
            found["shared"] = model.scores_shared_prompts(**places).cpu()
    return {name: float((scores - alone).abs().max()) for name, scores in found.items()}


def write_diagnostics(folder: Path, facts: Mapping[str, Any], worst: Sequence[Mapping[str, Any]]) -> None:
    """Write figures, worst errors and the reliability plot."""
    write_json(folder / DIAGNOSTICS, facts)
    (folder / WORST).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in worst), encoding="utf-8")
    if "reliability" in facts:
        _draw_reliability(facts["reliability"], folder / RELIABILITY)


def _starts(preferences: Sequence[TokenizedPreference]) -> list[int]:
    return list(accumulate((len(preference.responses_ids) for preference in preferences), initial=0))


def _by_attribute(scores: Tensor, weights: Mapping[str, float]) -> list[dict[str, Tensor]]:
    """For each member its scores `[N]` by attribute, the whole one too."""
    scores = scores.double()
    whole = scores @ torch.tensor([*weights.values()], dtype=torch.float64)
    named = [{name: own[:, i] for i, name in enumerate(weights)} for own in scores]
    return [parts | {OVERALL: own} for parts, own in zip(named, whole, strict=True)]


def _differences(compared: Sequence[Comparison], scores: Mapping[str, Tensor], starts: Sequence[int]) -> Tensor:
    """Better less worse `[M]` float64."""
    found = []
    for each in compared:
        own = scores.get(each.attribute, scores[OVERALL])
        (row, response), (other_row, other) = each.better, each.worse
        found.append(own[starts[row] + response] - own[starts[other_row] + other])
    return torch.stack(found)


def _lengths(compared: Sequence[Comparison], preferences: Sequence[TokenizedPreference]) -> Tensor:
    """Tokens `[M, 2]` float64 of the better and the worse response."""
    pairs = [[len(preferences[row].responses_ids[i]) for row, i in (each.better, each.worse)] for each in compared]
    return torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)


def _baselines(lengths: Tensor, clusters: Sequence[int], trained: Sequence[TokenizedPreference]) -> dict[str, Any]:
    """Accuracy of two rewards that know only the length: the longer is better, and a fit to the training rows."""
    found = {"longer": vars(figures.accuracy(lengths[:, 0] - lengths[:, 1], clusters))}
    if compared := figures.comparisons([preference.example for preference in trained]):
        better, worse = _lengths(compared, trained).unbind(-1)
        worth = LengthModel(better, worse)
        found["fitted_to_length"] = vars(figures.accuracy(worth(lengths[:, 0]) - worth(lengths[:, 1]), clusters))
    return found


def _correlations(
    preferences: Sequence[TokenizedPreference], scores: Tensor, weights: Mapping[str, float], starts: Sequence[int]
) -> dict[str, Any]:
    """Spearman's correlation of scores with ratings, by attribute, and its mean with the ranks of rankings."""
    named = _by_attribute(scores[None], weights)[0]
    rated: dict[str, list[tuple[float, float]]] = {}
    ranked = []
    for preference, start in zip(preferences, starts, strict=False):
        feedback = preference.example
        if isinstance(feedback.preference, Rating):
            for attribute, value in feedback.preference.values.items():
                own = named.get(attribute, named[OVERALL])
                rated.setdefault(attribute, []).append((float(own[start]), value))
        elif isinstance(feedback.preference, Ranking) and len(feedback.preference.sizes) > 1:
            ranks = [-i for i, size in enumerate(feedback.preference.sizes) for _ in range(size)]
            said = named.get(feedback.attribute, named[OVERALL])[start : start + len(ranks)].tolist()
            if len(set(said)) > 1:
                ranked.append(figures.rank_correlation(said, ranks))
    facts: dict[str, Any] = {}
    if ranked:
        facts["rank_correlation"] = sum(ranked) / len(ranked)
    for attribute, pairs in rated.items():
        predicted, values = zip(*pairs, strict=True)
        if len(set(values)) > 1 and len(set(predicted)) > 1:
            name = f"rating_correlation.{attribute}" if attribute else "rating_correlation"
            facts[name] = figures.rank_correlation(predicted, values)
    return facts


def _in_full(each: Comparison, preferences: Sequence[TokenizedPreference], difference: float) -> dict[str, Any]:
    (row, better), (other, worse) = each.better, each.worse
    feedback = preferences[row].example
    full = {
        "difference": difference,
        "prompt": prompt_text(feedback.prompt),
        "better": feedback.responses[better],
        "worse": preferences[other].example.responses[worse],
    }
    if row != other:
        full["prompt_of_worse"] = prompt_text(preferences[other].example.prompt)
    return full | ({"attribute": each.attribute} if each.attribute else {})


def _draw_reliability(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    figure = Figure(figsize=(4, 4), dpi=120, layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1, linestyle="--", label="perfectly calibrated")
    sizes = [12 + 200 * row["pairs"] / sum(r["pairs"] for r in rows) for row in rows]
    axes.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], linewidth=1)
    axes.scatter([r["confidence"] for r in rows], [r["accuracy"] for r in rows], s=sizes, label="held-out comparisons")
    axes.set(title="Reliability of the reward model", xlabel="confidence", ylabel="share in the right order")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path)
