"""Rewards for the steps of a response, by one of the user's functions, as a term."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from policies.schema import unread_settings
from rewards.children.source import FunctionSource
from rewards.spans import Span
from rewards.terms.base import FunctionScorer, RewardStage, TermInput, TermScores
from rewards.terms.function import UserFunctionSettings

if TYPE_CHECKING:  # settings are loaded without torch
    from torch import Tensor


class StepsTerm(UserFunctionSettings):
    """Rewards inside the response, by a function of your own: for each response it returns a list of spans
    `(start, end, score)` in characters, and each score is the reward of the token that completes the span. The score of
    the response is their sum.
    """

    kind: Literal["steps"]

    @model_validator(mode="after")
    def _is_neither_shifted_nor_clipped(self) -> "StepsTerm":
        if self.normalise != "no":
            raise unread_settings(
                "`normalise` shifts the score of a response, and `steps` scores its parts: scale them in the function",
                "normalise",
            )
        if self.clip is not None:
            raise unread_settings(
                "`clip` bounds the score of a response, and `steps` scores its parts: bound them in the function",
                "clip",
            )
        return self

    def source(self, name: str) -> FunctionSource:
        """The user's function, which returns spans."""
        return replace(super().source(name), returns="spans")

    def make_scorer(self, name: str, stage: RewardStage) -> "StepsScorer":
        """A scorer by the function; `close` ends its processes."""
        scorer = super().make_scorer(name, stage)
        return StepsScorer(
            caller=scorer.caller,
            name=scorer.name,
            label=scorer.label,
            fallback=scorer.fallback,
            columns=scorer.columns,
        )


class StepsScorer(FunctionScorer):
    """Scores the steps of responses. The fallback is the reward of a response's last token."""

    def __call__(self, batch: TermInput, /) -> TermScores:
        """Totals `[B]` and rewards of each token, `[T]` of each response."""
        scores = self.call(batch, None if self.fallback is None else [])
        import torch

        step_rewards: list[Tensor] = []
        for index, spans in enumerate(scores.values):
            step_rewards.append(_rewards_of_tokens(batch, index, [Span(*span) for span in spans]))
        if self.fallback is not None:
            for index in scores.failed:
                step_rewards[index][-1] = self.fallback
        totals = torch.stack([rewards.sum() for rewards in step_rewards])
        return TermScores(totals, self.failure_notes(scores), step_rewards)


def _rewards_of_tokens(batch: TermInput, index: int, spans: Sequence[Span]) -> "Tensor":
    """The sum of the scores of the spans that each token of a response completes, `[T]` float64."""
    import torch

    rewards = torch.zeros(batch.response_lengths[index], dtype=torch.float64)
    if spans:
        alignment = batch.align_text(index)
        for span in spans:
            rewards[alignment.completing_token(span.end)] += span.score
    return rewards
