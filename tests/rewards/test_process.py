"""The process reward model as a term: where it is read, and which rewards the steps get."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from policies.errors import UserError
from policies.text.alignment import TextAlignment
from rewards.schema import RewardSettings
from rewards.terms.base import RewardStage, TermInput, TermScores
from rewards.terms.model import ModelTerm
from rewards.terms.process import NUMBERS, PROBABILITIES, STEP_LABELS, ProcessTerm
from tests.policies.text.test_incremental import TOKENIZERS

TOKENIZER = TOKENIZERS["byte_level"]


def encoded(response: str) -> list[int]:
    return [*TOKENIZER(response)["input_ids"], TOKENIZER.eos_token_id]


def outputs_of(ids: list[int]) -> Tensor:
    """An output of the head for each token, all different."""
    return torch.linspace(-2, 2, len(ids))


def scored(responses: list[str], labels: str = PROBABILITIES, **settings: Any) -> TermScores:
    ids = [encoded(response) for response in responses]
    term = ProcessTerm.model_validate({"kind": "process", "separator": "\n"} | settings)
    batch = TermInput(
        prompts=["p"] * len(responses),
        decode_responses=lambda: responses,
        columns=[{}] * len(responses),
        response_lengths=[len(response) for response in ids],
        align_text=lambda index: TextAlignment(TOKENIZER, ids[index]),
        token_scores=[outputs_of(response) for response in ids],
    )
    return term.make_scorer("mine", RewardStage(RewardSettings(), {STEP_LABELS: labels}))(batch)


def at_ends(response: str, *ends: int) -> Tensor:
    """The probabilities at the first tokens after which the text is known so far, by a search over all prefixes."""
    ids = encoded(response)
    tokens = []
    for end in ends:
        prefixes = [TOKENIZER.decode(ids[: t + 1], skip_special_tokens=True) for t in range(len(ids))]
        tokens.append(next(t for t, prefix in enumerate(prefixes) if prefix.startswith(response[:end])))
    return outputs_of(ids)[tokens].double().sigmoid()


def test_each_step_gets_its_probability_at_the_token_that_completes_it() -> None:
    result = scored(["The cat. \n\nThe dog", "A mat"])
    first = at_ends("The cat. \n\nThe dog", 8, 18)
    second = at_ends("A mat", 5)
    for rewards, expected in zip(result.step_rewards, (first, second), strict=True):
        torch.testing.assert_close(rewards[rewards != 0], expected)
    torch.testing.assert_close(result.values, torch.stack([first.sum(), second.sum()]))
    assert result.notes["step_count/mine"].tolist() == [2.0, 1.0]


def test_differences_add_up_to_the_score_of_the_last_step() -> None:
    response = "The cat\nThe dog\nA mat"
    scores = at_ends(response, 7, 15, 21)
    result = scored([response], credit="difference")
    (rewards,) = result.step_rewards
    expected = torch.stack([scores[0], scores[1] - scores[0], scores[2] - scores[1]])
    torch.testing.assert_close(rewards[rewards != 0], expected)
    torch.testing.assert_close(result.values, scores[-1:])


def test_the_minimum_is_an_outcome() -> None:
    response = "The cat\nThe dog"
    result = scored([response], credit="minimum", normalise="running", clip=[-1, 1])
    torch.testing.assert_close(result.values, at_ends(response, 7, 15).min(0, keepdim=True).values)
    assert not result.step_rewards


def test_a_model_of_numbers_is_read_as_it_is() -> None:
    result = scored(["The cat"], labels=NUMBERS)
    torch.testing.assert_close(result.values, at_ends("The cat", 7).logit())


def test_a_response_without_text_is_read_at_its_last_token() -> None:
    result = scored(["", " \n"])
    assert [int(rewards.nonzero()) for rewards in result.step_rewards] == [0, len(encoded(" \n")) - 1]


def test_a_pattern_may_separate_responses_in_more_ways_than_the_data() -> None:
    response = "The cat\n \nThe dog\nA mat"
    assert scored([response], separator="\n\n", pattern=r"\n\s*\n").notes["step_count/mine"].item() == 2
    assert scored([response], separator="\n\n", pattern=r"\n+").notes["step_count/mine"].item() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": r"\n"}, "`pattern` does not match `separator`"),
        ({"pattern": "("}, "not a regular expression"),
        ({"pattern": r"\n*"}, "it matches an empty text"),
        ({"clip": [0, 1]}, "`clip` bounds the score of a response, and `credit: each` rewards its steps"),
        ({"credit": "difference", "normalise": "sft"}, "`normalise` shifts the score of a response"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProcessTerm.model_validate({"kind": "process"} | settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": "some/model"}, "`classifier` scores whole responses"),
        ({"ensemble": {"members": 2}}, "`ensemble` has no effect"),
        ({"centering": 0.1}, "`centering` has no effect"),
        ({"attributes": {"helpful": 1.0}}, "`attributes` has no effect"),
        ({"terms": {"a": {"kind": "process"}, "b": {"kind": "model"}}}, "there is one reward model"),
    ],
)
def test_settings_of_other_reward_models_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardSettings.model_validate({"terms": {"a": {"kind": "process"}}} | settings)


def test_a_reward_model_is_read_where_it_was_trained() -> None:
    preferences = RewardStage(RewardSettings(), {})
    with pytest.raises(UserError, match=r"reward.terms.mine is of kind process, .* not trained on labels of steps"):
        ProcessTerm(kind="process").make_scorer("mine", preferences)
    steps = RewardStage(RewardSettings(), {STEP_LABELS: PROBABILITIES})
    with pytest.raises(UserError, match=r"reward.terms.mine is of kind model, .* trained on labels of steps"):
        ModelTerm(kind="model").make_scorer("mine", steps)
