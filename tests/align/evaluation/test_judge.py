"""Figures of a judge, from simulated judges and from comparisons counted one by one."""

import random
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pytest
import torch

from align.config.judge_settings import JudgeSettings
from align.evaluation.judge import Comparisons, Replies, judge_pairs
from align.evaluation.tables import comparison_table
from policies.errors import UserError

PROMPTS = [f"p{number}" for number in range(40)]
INSTRUCTION = "{criterion}|{prompt}|{first}|{second}"
Decide = Callable[[str, str, str], str]


def judge(decide: Decide) -> Replies:
    """A judge that reads the fields of the message, thinks aloud, and decides."""

    def replies(messages: Sequence[str]) -> list[str]:
        written = []
        for message in messages:
            criterion, _, first, second = message.split("|")
            written.append(f"Not [[C]], but [[{decide(criterion, first, second)}]].")
        return written

    return replies


def figures(decide: Decide, ours: Sequence[str], theirs: Sequence[str], **settings: Any) -> dict[str, Any]:
    judge_settings = JudgeSettings(model="m", instruction=INSTRUCTION, **settings)
    first, without = judge_pairs(judge(decide), judge_settings, PROMPTS[: len(ours)], ours, theirs)
    weights = {name: criterion.weight for name, criterion in judge_settings.rubric.items()}
    longer = torch.tensor([len(a) - len(b) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    return Comparisons(first, weights, longer, without).figures()


def longer(criterion: str, first: str, second: str) -> str:
    if len(first) == len(second):
        return "C"
    return "A" if len(first) > len(second) else "B"


def test_a_judge_that_prefers_the_first_response_has_a_position_bias_and_no_opinion() -> None:
    found = figures(lambda criterion, first, second: "A", ["a"] * 40, ["b"] * 40)
    assert found["win_rate"] == 0.5
    assert found["first_share"] == 1
    assert found["first_share_low"] > 0.9
    assert found["agreement"] == 0
    assert found["without_verdict"] == 0


def test_a_judge_that_reads_the_responses_agrees_with_itself() -> None:
    found = figures(longer, ["aa", "a", "aa", "aaa"], ["a", "a", "aaa", "a"])
    assert found["win_rate"] == (1 + 0.5 + 0 + 1) / 4
    assert found["first_share"] == 0.5
    assert found["agreement"] == 1


def test_criteria_are_weighted() -> None:
    rubric = {"long": {"description": "long", "weight": 3}, "brief": {"description": "brief", "weight": 1}}

    def decide(criterion: str, first: str, second: str) -> str:
        return longer(criterion, first, second) if criterion == "long" else longer(criterion, second, first)

    found = figures(decide, ["aa", "aa"], ["a", "a"], rubric=rubric)
    assert found["win_rate"] == 0.75
    assert {name: own["win_rate"] for name, own in found["criteria"].items()} == {"long": 1, "brief": 0}
    facts = {"runs": ["a", "b"], "prompts": 2, "policy": {}, "against": {}, "judge": found}
    assert comparison_table(facts).row_count == 5


def test_the_figures_are_those_of_counting_one_by_one() -> None:
    pick = random.Random(0)
    verdicts = {}
    ours = [f"ours {number}" for number in range(40)]
    theirs = [f"theirs {number}" for number in range(40)]
    for number in range(40):
        for key in ((ours[number], theirs[number]), (theirs[number], ours[number])):
            verdicts[key] = pick.choice("AABC")
    found = figures(lambda criterion, first, second: verdicts[first, second], ours, theirs)
    value = {"A": 1.0, "B": 0.0, "C": 0.5}
    wins, firsts, agreed = [], [], []
    for ourselves, others in zip(ours, theirs, strict=True):
        wins += [value[verdicts[ourselves, others]], 1 - value[verdicts[others, ourselves]]]
        firsts += [value[verdicts[ourselves, others]], value[verdicts[others, ourselves]]]
        swapped = {"A": "B", "B": "A", "C": "C"}[verdicts[others, ourselves]]
        agreed.append(verdicts[ourselves, others] == swapped)
    assert found["win_rate"] == pytest.approx(fmean(wins))
    assert found["first_share"] == pytest.approx(fmean(firsts))
    assert found["agreement"] == pytest.approx(fmean(agreed))
    assert found["first_share_low"] > 0.5


def test_a_reply_without_a_verdict_is_an_error_or_a_counted_tie() -> None:
    settings = JudgeSettings(model="m", instruction=INSTRUCTION)
    replies = lambda messages: ["none, [[D]]", "[[A]]"]  # noqa: E731
    with pytest.raises(UserError, match=r"1 of 2 replies of m have no verdict, \[\[A\]\]"):
        judge_pairs(replies, settings, ["p"], ["a"], ["b"])
    lenient = settings.model_copy(update={"on_no_verdict": "tie"})
    first, without = judge_pairs(replies, lenient, ["p"], ["a"], ["b"])
    assert without == 1
    assert first["overall"].tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"instruction": "{prompt} {first} {criterion}"}, "instruction has no {second}"),
        ({"instruction": INSTRUCTION + "{answer}"}, "instruction names {answer}; the fields are prompt"),
        ({"rubric": {}}, "at least 1 item"),
        ({"rubric": {"a b": {"description": "x"}}}, "rubric: 'a b' is not a valid name"),
        ({"parallel": 2}, "`parallel` has no effect without `url`"),
        ({"url": "localhost"}, "an http:// or https:// address was expected"),
    ],
)
def test_settings_of_a_judge_that_cannot_work_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("{", r"\{").replace("}", r"\}")):
        JudgeSettings(model="m", **settings)
