"""Rewards inside responses: what a function may return, and on which tokens they land."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from policies.errors import UserError
from policies.text.alignment import TextAlignment
from rewards.schema import RewardSettings
from rewards.spans import Span, read_spans
from rewards.terms.base import RewardStage, TermInput, TermScores
from rewards.terms.steps import StepsTerm
from rewards.user_functions import Failure
from tests.policies.text.test_incremental import TOKENIZERS

FUNCTION = """
def steps(prompts, responses, columns):
    if any("crash" in response for response in responses):
        raise RuntimeError("no such step")
    spans = []
    for response in responses:
        ends = [i + 1 for i, character in enumerate(response) if character == "."]
        spans.append([{"start": 0, "end": end, "score": end} for end in ends])
    return spans
"""


def scored(tokenizer: PreTrainedTokenizerFast, responses: list[str], folder: Path, **settings: Any) -> TermScores:
    (folder / "score.py").write_text(FUNCTION)
    ids = [[*tokenizer(response)["input_ids"], tokenizer.eos_token_id] for response in responses]
    term = StepsTerm(kind="steps", function=f"{folder}/score.py:steps", **settings)
    scorer = term.make_scorer("mine", RewardStage(RewardSettings(), {}))
    try:
        return scorer(
            TermInput(
                prompts=["p"] * len(responses),
                decode_responses=lambda: responses,
                columns=[{}] * len(responses),
                response_lengths=[len(response) for response in ids],
                align_text=lambda index: TextAlignment(tokenizer, ids[index]),
            )
        )
    finally:
        scorer.close()


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_score_lands_on_the_token_that_completes_its_span(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]
    result = scored(tokenizer, ["日.a.", "none"], tmp_path)
    assert result.values.tolist() == [6.0, 0.0]
    full_stops = [i for i, token in enumerate(tokenizer("日.a.")["input_ids"]) if tokenizer.decode([token]) == "."]
    (first, second) = result.step_rewards
    assert first.dtype == torch.float64
    assert first.nonzero().flatten().tolist() == full_stops
    assert first[full_stops].tolist() == [2.0, 4.0]
    assert second.count_nonzero() == 0


def test_a_response_that_the_call_fails_for_gets_the_fallback_at_its_end(tmp_path: Path) -> None:
    result = scored(TOKENIZERS["byte_level"], ["a.", "crash."], tmp_path, fallback=-3.0)
    assert result.values.tolist() == [2.0, -3.0]
    assert result.step_rewards[1][-1] == -3.0
    assert result.notes["failed/mine"].tolist() == [0.0, 1.0]


def test_without_a_fallback_the_response_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward.terms.mine.function: .* raised RuntimeError: no such step .*crash"):
        scored(TOKENIZERS["byte_level"], ["a.", "crash."], tmp_path)


@pytest.mark.parametrize("span", [(1, 3, 0.5), [1, 3, 0.5], {"start": 1, "end": 3, "score": 0.5}])
def test_spans_may_be_tuples_lists_or_mappings(span: object) -> None:
    assert read_spans([[span, (0, 1, 2)], []], ["abc", "d"]) == [[Span(1, 3, 0.5), Span(0, 1, 2.0)], []]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (3.0, "returned 3.0; a list with one list of spans per response was expected"),
        ([[], []], "returned 2 lists of spans for 1 responses"),
        ([0.5], "returned 0.5 for the response 'abc'; a list of spans was expected"),
        ([[(0, 4, 1.0)]], r"span \(0, 4, 1.0\) for the response 'abc' of 3 characters; 0 <= start < end <= 3"),
        ([[(2, 2, 1.0)]], "0 <= start < end <= 3 was expected"),
        ([[(-1, 2, 1.0)]], "0 <= start < end <= 3 was expected"),
        ([[(0, 2)]], r"\(start, end, score\) was expected: two integers and a number"),
        ([[(0, 2.5, 1.0)]], "two integers and a number"),
        ([[(0, 2, "1")]], "two integers and a number"),
        ([[{"start": 0, "end": 2}]], "two integers and a number"),
        ([[(0, 2, float("nan"))]], "a score must be finite"),
    ],
)
def test_anything_else_is_refused_with_the_reason(result: object, reason: str) -> None:
    refusal = read_spans(result, ["abc"])
    assert isinstance(refusal, Failure)
    with pytest.raises(Failure, match=reason):
        raise refusal


@pytest.mark.parametrize("setting", [{"normalise": "running"}, {"clip": [0, 1]}])
def test_settings_of_whole_scores_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="`steps` scores its parts"):
        StepsTerm(kind="steps", function="score.py:steps", **setting)
