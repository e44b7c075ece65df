"""Accuracy by subset, for rows of RewardBench 1 and 2."""

import math
import random
from typing import Any

import pytest
import torch

from align.data.examples import TokenizedPreference
from align.evaluation.subsets import subset_figures
from align.evaluation.tables import diagnostics_table
from rewards.diagnostics import wilson
from rewards.preferences import Pair, PreferenceExample, Ranking, parse_preference

FIRST = {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "chat"}
SECOND = {"prompt": "p", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "facts"}
TIES = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"], "subset": "Ties"}


def tokenized(values: dict[str, Any]) -> TokenizedPreference:
    example = parse_preference(values)
    return TokenizedPreference(example, [1], [[2] for _ in example.responses])


def test_rows_of_both_forms_are_parsed() -> None:
    assert parse_preference(FIRST) == PreferenceExample("p", ("a", "b"), Pair(), subset="chat")
    assert parse_preference(SECOND) == PreferenceExample("p", ("a", "b", "c", "d"), Ranking((1, 3)), subset="facts")
    assert parse_preference(TIES) == PreferenceExample("p", ("a", "b", "c"), Ranking((2, 1)), subset="Ties")


def test_a_response_cannot_be_chosen_and_rejected() -> None:
    with pytest.raises(ValueError, match="'a' is both in `chosen` and in `rejected`"):
        parse_preference(SECOND | {"rejected": ["b", "a"]})
    with pytest.raises(ValueError, match=r"`rejected\[1\]` is a number"):
        parse_preference(SECOND | {"rejected": ["b", 3]})


def test_the_better_responses_must_score_higher_than_all_others() -> None:
    rows: list[dict[str, Any]] = [FIRST, FIRST, SECOND, SECOND, SECOND, TIES, TIES]
    scores = [[2, 1], [1, 1], [4, 1, 2, 3], [3, 1, 4, 0], [3, 1, 3, 0], [3, 2, 1], [3, 1, 2]]
    flat = torch.tensor([score for row in scores for score in row], dtype=torch.float64)
    figures = subset_figures([tokenized(row) for row in rows], flat)
    assert figures["subsets"] == {
        "chat": vars(wilson(1 / 2, 2)),
        "facts": vars(wilson(1 / 3, 3)),
        "Ties": vars(wilson(1 / 2, 2)),
    }
    assert figures["subset_mean"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert diagnostics_table(figures).row_count == 4


def upstream_ties_score(rows: list[dict[str, Any]], scores: list[list[float]]) -> float:
    """The definition, pair by pair in plain Python."""
    by_id = {row["id"]: (row, own) for row, own in zip(rows, scores, strict=True)}
    total = 0.0
    numbers = [name.removeprefix("ref:") for name in by_id if name.startswith("ref:")]
    for number in numbers:
        gaps = {}
        for kind in ("ref", "tied"):
            row, own = by_id[f"{kind}:{number}"]
            right = sorted(own[: len(row["chosen"])])
            gaps[kind] = right[0] - max(own[len(row["chosen"]) :])
            spread = right[-1] - right[0]  # of the tied one, which is last
        least = min(gaps.values())
        total += 0.3 * (gaps["ref"] > 0) + 0.3 * (gaps["tied"] > 0)
        total += 0.2 * (gaps["tied"] > spread) + 0.2 * (least > spread)
        total += 0.01 * math.tanh(least / spread - 1)
    return total / len(numbers)


def test_pairs_of_ties_have_the_weighted_score_of_the_benchmark() -> None:
    pick = random.Random(0)
    rows: list[dict[str, Any]] = []
    scores = []
    for number in range(30):
        right = [f"right {i}" for i in range(3)]
        rows.append(TIES | {"id": f"ref:{number}", "chosen": right[:1], "rejected": ["wrong", "also"]})
        rows.append(TIES | {"id": f"tied:{number}", "chosen": right, "rejected": ["wrong", "also"]})
        scores.append([pick.gauss(1.5, 1), pick.gauss(0, 1), pick.gauss(0, 1)])
        scores.append([pick.gauss(2, 0.3) for _ in right] + [pick.gauss(0, 1), pick.gauss(0, 1)])
    flat = torch.tensor([score for row in scores for score in row], dtype=torch.float64)
    figures = subset_figures([tokenized(row) for row in rows], flat)
    ties = figures["ties"]
    assert ties["score"] == pytest.approx(upstream_ties_score(rows, scores))
    assert ties["score_low"] < ties["score"] < ties["score_high"]
    assert 0 < ties["margin_preferred_hard"] < ties["margin_preferred"] < 1
    assert ties["pairs"] == 30
    assert figures["subset_mean"] == ties["score"]
    assert figures["subsets"]["Ties"]["pairs"] == 60
    assert diagnostics_table(figures).row_count == 3


def test_a_prompt_of_ties_without_its_partner_has_no_weighted_score() -> None:
    alone = TIES | {"id": "tied:3"}
    assert "ties" not in subset_figures([tokenized(alone)], torch.tensor([2.0, 3.0, 1.0]))


def test_right_responses_of_one_score_are_as_close_as_they_can_be() -> None:
    rows = [TIES | {"id": "ref:1", "chosen": ["a"], "rejected": ["b"]}, TIES | {"id": "tied:1"}]
    scores = torch.tensor([1.0, 0.0, 2.0, 2.0, 0.0])
    assert subset_figures([tokenized(row) for row in rows], scores)["ties"]["score"] == pytest.approx(1.01)


def test_rows_without_a_subset_and_ties_have_no_figures() -> None:
    plain = {name: value for name, value in FIRST.items() if name != "subset"}
    tied = FIRST | {"tie": True}
    assert subset_figures([tokenized(plain), tokenized(tied)], torch.tensor([1.0, 0.0, 1.0, 0.0])) == {}
