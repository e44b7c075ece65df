"""Figures of the comparison of two policies."""

import pytest
import torch

from align.evaluation.comparison import ScoredResponses, comparison_figures
from align.evaluation.intervals import share_with_interval, with_interval
from align.evaluation.length_control import length_controlled_win_rate
from align.evaluation.tables import comparison_table

SCORES = torch.tensor([2.0, 1.0, 0.0, 1.0, 3.0, 0.0])
OTHERS = torch.tensor([1.0, 1.0, 1.0, 0.0, 4.0, -1.0])
WINS = torch.tensor([1.0, 0.5, 0.0, 1.0, 0.0, 1.0])
LENGTHS = torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0, 4.0])
OTHER_LENGTHS = torch.tensor([6.0, 6.0, 5.0, 9.0, 8.0, 3.0])


def test_figures_of_a_comparison() -> None:
    facts = comparison_figures(ScoredResponses(SCORES, LENGTHS), ScoredResponses(OTHERS, OTHER_LENGTHS))
    policy = facts["policy"]
    controlled = length_controlled_win_rate(WINS, LENGTHS - OTHER_LENGTHS)
    assert controlled is not None
    expected = with_interval("score_gain", SCORES - OTHERS) | share_with_interval("win_rate", WINS)
    expected |= {"length_controlled_win_rate": controlled.win_rate, **with_interval("score_mean", SCORES)}
    assert {name: policy[name] for name in expected} == pytest.approx(expected)
    assert facts["against"] == with_interval("score_mean", OTHERS) | with_interval("length_mean", OTHER_LENGTHS)
    assert comparison_table({"runs": ["a", "b"], "prompts": 6, **facts}).row_count == 5


def test_gold_scores_are_compared_by_themselves() -> None:
    ours = ScoredResponses(SCORES, LENGTHS, gold=-SCORES)
    theirs = ScoredResponses(OTHERS, OTHER_LENGTHS, gold=-OTHERS)
    policy = comparison_figures(ours, theirs)["policy"]
    assert policy["gold_gain"] == pytest.approx(-policy["score_gain"])
    assert policy["gold_win_rate"] == pytest.approx(1 - policy["win_rate"])
