"""The composition of step rewards with the scores of whole responses."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from align.scoring.reward import Reward
from rewards.compose import Composition
from rewards.constraint import ConstraintSettings
from rewards.terms.base import TermInput, TermScorer, TermScores, TermSettings
from rewards.terms.regex import RegexTerm
from rewards.terms.steps import StepsTerm
from rollouts.trajectory import Request, RoleOutputs, Trajectory

STEPS = [torch.tensor([0.1, 0.0, 0.7]).double(), torch.tensor([0.0, -0.3]).double()]
OUTCOMES = torch.tensor([1.0, 0.25], dtype=torch.float64)


def constant(values: Tensor, step_rewards: Sequence[Tensor] = ()) -> TermScorer:
    def score(batch: TermInput) -> TermScores:
        return TermScores(values, {}, step_rewards)

    return score


STEP_SCORER = constant(torch.stack([rewards.sum() for rewards in STEPS]), STEPS)


def make_reward(
    tokenizer: PreTrainedTokenizerFast, terms: Mapping[str, tuple[TermSettings, TermScorer]], cost: str | None = None
) -> Reward:
    constraint = ConstraintSettings(term=cost, at_most=0.1, rate=1.0, start=3.0) if cost else None
    settings = {name: term for name, (term, _) in terms.items()}
    return Reward({name: scorer for name, (_, scorer) in terms.items()}, Composition(settings, constraint), tokenizer)


def scored(reward: Reward) -> list[RoleOutputs]:
    trajectories = []
    outputs = []
    for rewards in STEPS:
        length = len(rewards)
        trajectories.append(Trajectory.from_tokens(Request("p", (1,), 0), range(length), torch.zeros(length), True, 0))
        outputs.append(RoleOutputs(torch.zeros(length), torch.zeros(length), torch.empty(0), float("nan")))
    return reward.score_and_update(trajectories, outputs)


def steps_term(weight: float = 1.0) -> StepsTerm:
    return StepsTerm(kind="steps", function="score.py:steps", weight=weight)


def outcome_term(weight: float = 1.0) -> RegexTerm:
    return RegexTerm(kind="regex", pattern="x", weight=weight)


def test_the_score_is_the_outcome_and_the_weighted_step_rewards(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    terms = {"steps": (steps_term(2.0), STEP_SCORER), "whole": (outcome_term(0.5), constant(OUTCOMES))}
    outputs = scored(make_reward(tiny_tokenizer, terms))
    for output, rewards, outcome in zip(outputs, STEPS, OUTCOMES.tolist(), strict=True):
        assert output.step_rewards is not None
        assert torch.equal(output.step_rewards, (2 * rewards).float())
        assert output.outcome == pytest.approx(0.5 * outcome, abs=1e-15)
        assert output.score == pytest.approx(0.5 * outcome + 2 * float(rewards.sum()), abs=1e-6)
        assert output.notes == {"steps/steps": pytest.approx(float(rewards.sum())), "term/whole": outcome}


def test_step_rewards_alone_leave_no_outcome(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    outputs = scored(make_reward(tiny_tokenizer, {"steps": (steps_term(0.3), STEP_SCORER)}))
    assert [output.outcome for output in outputs] == [0.0, 0.0]
    assert all("steps/steps" in output.notes for output in outputs)


def test_several_terms_add_up_at_each_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    terms = {"one": (steps_term(1.0), STEP_SCORER), "two": (steps_term(-0.25), STEP_SCORER)}
    for output, rewards in zip(scored(make_reward(tiny_tokenizer, terms)), STEPS, strict=True):
        torch.testing.assert_close(output.step_rewards, (0.75 * rewards).float())


@pytest.mark.parametrize("cost", ["steps", "whole"])
def test_a_constraint_weighs_steps_and_outcome_by_the_multiplier_of_the_score(
    cost: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    terms = {"steps": (steps_term(), STEP_SCORER), "whole": (outcome_term(), constant(OUTCOMES))}
    factors = {"steps": 0.25, "whole": 0.25} | {cost: -0.75}  # 1 / (1 + λ) and -λ / (1 + λ), λ = 3
    reward = make_reward(tiny_tokenizer, terms, cost)
    outputs = scored(reward)
    assert reward.composition.multiplier != 3.0
    for output, rewards, outcome in zip(outputs, STEPS, OUTCOMES.tolist(), strict=True):
        torch.testing.assert_close(output.step_rewards, (factors["steps"] * rewards).float())
        assert output.outcome == pytest.approx(factors["whole"] * outcome)


def test_without_step_rewards_nothing_is_added(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    terms = {"one": (outcome_term(), constant(OUTCOMES)), "two": (outcome_term(0.5), constant(OUTCOMES))}
    outputs = scored(make_reward(tiny_tokenizer, terms))
    assert [(output.step_rewards, output.score) for output in outputs] == [(None, 1.5), (None, 0.375)]
