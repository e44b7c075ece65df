"""Accuracy by subset, for rows of RewardBench 1 and 2."""

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


def test_rows_without_a_subset_and_ties_have_no_figures() -> None:
    plain = {name: value for name, value in FIRST.items() if name != "subset"}
    tied = FIRST | {"tie": True}
    assert subset_figures([tokenized(plain), tokenized(tied)], torch.tensor([1.0, 0.0, 1.0, 0.0])) == {}
