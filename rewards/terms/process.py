"""The process reward model, read at the end of each step of a response, as a term."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from policies.errors import UserError
from policies.schema import unread_settings
from rewards.step_labels import step_ends
from rewards.terms.base import RewardStage, TermInput, TermScores, TermSettings

if TYPE_CHECKING:  # settings are loaded without torch
    from torch import Tensor

Credit = Literal["each", "difference", "minimum"]
STEP_LABELS = "step_labels"
"""The key in the facts of a reward model that was trained on labels of steps; its value is one of the two below."""
PROBABILITIES = "probabilities"
NUMBERS = "numbers"


class ProcessTerm(TermSettings):
    """Scores of the process reward model, which the stage `reward` trains on labels of steps: it is read at the last
    token of each step of the response, and `credit` says which reward that token gets.
    """

    kind: Literal["process"]
    separator: str = Field(
        "\n\n", min_length=1, description="text between two steps: in the labelled rows, and in responses"
    )
    pattern: str | None = Field(
        None, description="regular expression of what separates steps in responses; unset: `separator`"
    )
    credit: Credit = Field(
        "each",
        description="rewards of the steps: each one's score; the difference from the score of the step before; or "
        "nothing but the minimum, as the outcome",
    )

    @property
    def mark(self) -> re.Pattern[str]:
        """What separates the steps of a response."""
        return re.compile(self.pattern or re.escape(self.separator))

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            matches_nothing = pattern is not None and re.compile(pattern).fullmatch("") is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if matches_nothing:
            raise ValueError("it matches an empty text, and would separate any two characters")
        return pattern

    @model_validator(mode="after")
    def _responses_are_like_the_data(self) -> "ProcessTerm":
        if self.pattern is not None and not self.mark.fullmatch(self.separator):
            raise ValueError(
                f"`pattern` does not match `separator`, {self.separator!r}: steps would end elsewhere in responses "
                "than in the labelled rows"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_neither_shifted_nor_clipped(self) -> "ProcessTerm":
        if self.credit == "minimum":
            return self
        for name, verb in (("normalise", "shifts"), ("clip", "bounds")):
            if getattr(self, name) not in ("no", None):
                raise unread_settings(
                    f"`{name}` {verb} the score of a response, and `credit: {self.credit}` rewards its steps: remove "
                    "it, or use `credit: minimum`",
                    name,
                )
        return self

    def make_scorer(self, name: str, stage: RewardStage) -> "ProcessScorer":
        """A scorer by the outputs of the reward head at each token. Raises UserError for another reward model."""
        check_reads_steps(stage.facts, f"reward.terms.{name}")
        is_logit = stage.facts[STEP_LABELS] == PROBABILITIES
        return ProcessScorer(name, self.mark, CREDITS[self.credit], is_logit)


def check_reads_steps(facts: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a reward model, by the facts in its folder, was not trained on labels of steps.

    Args:
        facts: The content of its `stage.json`.
        where: What needs such a model, for the message.
    """
    if STEP_LABELS not in facts:
        raise UserError(
            f"{where} is of kind process, and the reward model was not trained on labels of steps "
            "(data.step_labels): a model of preferences is read by a term of kind model"
        )


@dataclass(frozen=True)
class ProcessScorer:
    """Scores the steps of responses by the process reward model.

    The note `step_count/NAME` is the number of steps.

    Attributes:
        name: The term's name.
        mark: What separates steps.
        credit: Turns the scores of K steps, `[K]` float64, into the total and the rewards of the steps, `[K]`, or None
            where the total is the outcome.
        is_logit: Whether σ of an output is the probability that a step is right; otherwise the output is its score.
    """

    name: str
    mark: re.Pattern[str]
    credit: "Callable[[Tensor], tuple[Tensor, Tensor | None]]"
    is_logit: bool

    def __call__(self, batch: TermInput, /) -> TermScores:
        import torch

        totals: list[Tensor] = []
        step_rewards: list[Tensor] = []
        counts: list[float] = []
        for index, outputs in enumerate(batch.token_scores):
            tokens = self.step_tokens(batch, index)
            scores = outputs[tokens].double()  # [K]
            total, rewards = self.credit(scores.sigmoid() if self.is_logit else scores)
            totals.append(total)
            counts.append(float(len(tokens)))
            if rewards is not None:
                of_tokens = torch.zeros(len(outputs), dtype=torch.float64)  # [T]
                of_tokens[tokens] = rewards
                step_rewards.append(of_tokens)
        notes = {f"step_count/{self.name}": torch.tensor(counts, dtype=torch.float64)}
        return TermScores(torch.stack(totals), notes, step_rewards)

    def step_tokens(self, batch: TermInput, index: int) -> list[int]:
        """The token that completes each step of a response; its last token where it has no text."""
        alignment = batch.align_text(index)
        ends = step_ends(alignment.text, self.mark)
        tokens = [alignment.completing_token(end) for end in ends] or [batch.response_lengths[index] - 1]
        return sorted(set(tokens))  # a token may complete several steps


def each_step(scores: "Tensor") -> "tuple[Tensor, Tensor | None]":
    """Every step gets its own score, as in step-by-step PPO (Wang et al. 2024, "Math-Shepherd").

    The total grows with the number of steps.
    """
    return scores.sum(), scores


def step_differences(scores: "Tensor") -> "tuple[Tensor, Tensor | None]":
    """Every step gets what it adds to the score of the step before it; before the first, the score is 0.

    The total is the score of the last step: potential-based shaping (Ng, Harada and Russell 1999), and the progress of
    Setlur et al. 2024, "Rewarding progress".
    """
    import torch

    return scores[-1], torch.cat([scores[:1], scores.diff()])


def lowest_step(scores: "Tensor") -> "tuple[Tensor, Tensor | None]":
    """The response gets the score of its worst step.

    Lightman et al. 2023, "Let's verify step by step"; Cheng et al. 2025, "Stop summation" (PURE).
    """
    return scores.min(), None


CREDITS: "Mapping[Credit, Callable[[Tensor], tuple[Tensor, Tensor | None]]]" = {
    "each": each_step,
    "difference": step_differences,
    "minimum": lowest_step,
}
"""How the scores of steps become rewards."""
