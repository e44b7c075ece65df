"""Terms that say whether a response is right."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from align.config.schema import Experiment
from align.scoring.reward import Reward
from policies.errors import UserError
from rewards.calls import InProcess
from rewards.compose import Composition
from rewards.terms.base import FunctionScorer
from rewards.terms.registry import TERMS
from rollouts.trajectory import Request, RoleOutputs, Trajectory

Columns = Sequence[Mapping[str, Any]]


def reward(tokenizer: PreTrainedTokenizerFast, scores: list[float | None], fallback: float | None = None) -> Reward:
    """A reward of one verifiable term, normalised and weighted, that gives these scores; None: its call fails."""

    def rule(prompts: Sequence[str], responses: Sequence[str], columns: Columns) -> list[float]:
        given = [scores[row["number"]] for row in columns]
        if None in given:
            raise ValueError("no answer")
        return given  # type: ignore[return-value]

    settings = TERMS["function"].model_validate(
        {"kind": "function", "function": "rule.py:rule", "weight": 3.0, "clip": [-0.5, 0.5], "verifiable": True}
    )
    scorer = FunctionScorer(InProcess(rule), "rule", "the rule", fallback)
    return Reward({"rule": scorer}, Composition({"rule": settings}, None), tokenizer, verifiable=["rule"])


def verdicts(
    tokenizer: PreTrainedTokenizerFast, scores: list[float | None], fallback: float | None = None
) -> list[float]:
    trajectories = []
    outputs = []
    for number in range(len(scores)):
        request = Request("a", (5,), seed=0, columns={"number": number})
        trajectories.append(Trajectory.from_tokens(request, (6, 7), torch.zeros(2), ended=True, version=0))
        outputs.append(RoleOutputs(torch.zeros(2), torch.zeros(2), torch.zeros(3), 0.0))
    rescore = reward(tokenizer, scores, fallback).score_for_evaluation(trajectories, outputs)
    return [output.notes["right/rule"] for output in rescore()]


def test_a_response_is_right_by_the_score_itself(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert verdicts(tiny_tokenizer, [1.0, 0.0, 1.0]) == [1.0, 0.0, 1.0]


def test_a_response_that_the_call_fails_for_is_not_right(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert verdicts(tiny_tokenizer, [1.0, None, 0.0], fallback=1.0) == [1.0, 0.0, 0.0]
    assert verdicts(tiny_tokenizer, [1.0, None, 0.0], fallback=-2.0) == [1.0, 0.0, 0.0]


def test_another_score_is_a_mistake(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"reward.terms.rule is verifiable: .* and it has given 0.5"):
        verdicts(tiny_tokenizer, [1.0, 0.5])


def test_the_terms_that_are_rules_say_so() -> None:
    needed: dict[str, dict[str, Any]] = {"regex": {"pattern": "a"}, "function": {"function": "a.py:b"}}
    for kind in ("exact", "number", "math", "json", "regex"):
        assert TERMS[kind].model_validate({"kind": kind, **needed.get(kind, {})}).is_verifiable
    for kind in ("function", "repetition", "model"):
        assert not TERMS[kind].model_validate({"kind": kind, **needed.get(kind, {})}).is_verifiable


def test_several_samples_need_a_rule() -> None:
    settings: dict[str, Any] = {"name": "a", "model": {"path": "m"}, "evaluation": {"samples_per_prompt": 4}}
    with pytest.raises(ValueError, match=r"samples_per_prompt has no effect: .* a verifiable term"):
        Experiment.model_validate(settings)
    settings["reward"] = {"terms": {"answer": {"kind": "number"}}}
    assert Experiment.model_validate(settings).evaluation.samples_per_prompt == 4
    settings["evaluation"]["temperature"] = 0
    with pytest.raises(ValueError, match="samples_per_prompt: greedy samples"):
        Experiment.model_validate(settings)
