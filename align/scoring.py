"""From trajectories and what the roles say of them to final scores, by parts that are chosen before the loop starts."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from policies.encoding import decode_response, prompt_text
from rewards.classifier import Classifier
from rewards.functions import ScoreFunction, call_function
from rollouts.trajectory import Scored, Trajectory

Reward = Callable[[Sequence[Trajectory], list[Scored]], list[Scored]]
"""Puts the score into each verdict."""

Score = Callable[[Sequence[Trajectory]], list[Scored]]
"""Verdicts on trajectories."""


class RolesScore(Protocol):
    """What the roles that are asked say of trajectories."""

    def __call__(self, trajectories: Sequence[Trajectory], asked: Collection[str], /) -> list[Scored]: ...


Gold = Callable[[Sequence[Trajectory]], list[float]]
"""The true score of each trajectory, where the user has one."""


def trunk_reward(trajectories: Sequence[Trajectory], scored: list[Scored]) -> list[Scored]:
    """The reward is a role on the trunk: the score is there already."""
    return scored


def classifier_reward(
    classifier: Classifier, tokenizer: PreTrainedTokenizerBase, mean: float, deviation: float
) -> Reward:
    """A ready classifier's scores of the text, shifted and scaled by those of SFT responses."""

    def reward(trajectories: Sequence[Trajectory], scored: list[Scored]) -> list[Scored]:
        responses = [decode_response(tokenizer, t.response_ids) for t in trajectories]
        scores = (classifier.score([t.request.prompt for t in trajectories], responses) - mean) / deviation
        return [replace(verdict, score=score) for verdict, score in zip(scored, scores.tolist(), strict=True)]

    return reward


def gold_score(function: ScoreFunction, tokenizer: PreTrainedTokenizerBase) -> Gold:
    """The user's function as a score of trajectories."""

    def gold(trajectories: Sequence[Trajectory]) -> list[float]:
        return call_function(
            function,
            [prompt_text(t.request.prompt) for t in trajectories],
            [decode_response(tokenizer, t.response_ids) for t in trajectories],
            [t.request.columns for t in trajectories],
        )

    return gold
