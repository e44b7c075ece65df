"""The base classes of reward terms: their settings, the batch that they score, and their scorers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from policies.schema import Settings
from rewards.user_functions import ScoreFunction, call_function

if TYPE_CHECKING:  # settings are loaded without torch and transformers
    from torch import Tensor

    from policies.text.tokenization import Prompt
    from rewards.schema import RewardSettings


@dataclass(frozen=True)
class TermInput:
    """A batch of B responses, with everything that a term may use to score them.

    Attributes:
        prompts: `[B]`, as in the data: texts or lists of messages.
        decode_responses: Returns the texts of the responses `[B]`; called at most once, when a term reads them.
        columns: `[B]`, the other columns of each prompt's row.
        response_lengths: `[B]`, in tokens.
        reward_outputs: `[B, C]` float32 of the reward heads on the shared base model: for each member of the ensemble
            its overall score, then its score of each attribute. None where the reward has no term of kind `model`, or
            its model is a pretrained classifier.
    """

    prompts: Sequence["Prompt"]
    decode_responses: Callable[[], Sequence[str]]
    columns: Sequence[Mapping[str, Any]]
    response_lengths: Sequence[int]
    reward_outputs: "Tensor | None" = None

    @cached_property
    def responses(self) -> Sequence[str]:
        """The texts of the responses `[B]`, without special tokens."""
        return self.decode_responses()

    @cached_property
    def prompt_texts(self) -> list[str]:
        """The prompts `[B]` as one string each."""
        from policies.text.tokenization import prompt_text

        return [prompt_text(prompt) for prompt in self.prompts]


@dataclass(frozen=True)
class TermScores:
    """A term's scores of a batch.

    Attributes:
        values: Scores `[B]` float64, before they are normalised, clipped and weighted.
        notes: Further figures `[B]` by the name under which they are logged.
    """

    values: "Tensor"
    notes: dict[str, "Tensor"] = field(default_factory=dict)


class TermScorer(Protocol):
    """Scores a batch by one term."""

    def __call__(self, batch: TermInput, /) -> TermScores: ...


@dataclass(frozen=True)
class RewardStage:
    """The reward stage, as far as a term may need to know it.

    Attributes:
        settings: The section `reward` of the experiment.
        facts: The content of `reward/stage.json`; empty where no reward model was trained or reused.
    """

    settings: "RewardSettings"
    facts: Mapping[str, Any]


class TermSettings(Settings, ABC):
    """The settings that all terms share.

    A kind of term is a subclass with a field `kind: Literal["NAME"]`. The first paragraph of its docstring says what
    the score is, and is also its row in the table of `docs/rewards.md`.
    """

    weight: float = Field(1.0, description="factor of the term in the sum; negative: a penalty")
    clip: tuple[float, float] | None = Field(None, description="[min, max] of the score, once normalised")
    normalise: Literal["no", "sft", "running"] = Field(
        "no",
        description="shift and scale to mean 0, standard deviation 1: over SFT responses, or over all that PPO has "
        "sampled so far",
    )

    @field_validator("clip")
    @classmethod
    def _is_increasing(cls, clip: tuple[float, float] | None) -> tuple[float, float] | None:
        if clip and clip[0] >= clip[1]:
            raise ValueError("[min, max] was expected")
        return clip

    @property
    def columns(self) -> list[str]:
        """The columns that every prompt's row must have."""
        return []

    def check(self, name: str) -> None:
        """Check, before a run starts, that what the settings name exists.

        Args:
            name: The term's name, for messages: its settings are under `reward.terms.NAME`.

        Raises:
            UserError: A file, model, function, package or environment variable is missing.
        """

    @abstractmethod
    def make_scorer(self, name: str, stage: RewardStage) -> TermScorer:
        """Make the scorer of this term.

        Args:
            name: The term's name, for messages and for the names of its notes.
            stage: The settings and the outcome of the reward stage.

        Raises:
            UserError: Something that the settings name is missing.
        """


class TextTermSettings(TermSettings):
    """A term that scores texts by a function of prompts, responses and columns."""

    @abstractmethod
    def make_function(self, name: str) -> ScoreFunction:
        """Make the function that scores a batch.

        Args:
            name: The term's name, for messages.

        Raises:
            UserError: Something that the settings name is missing.
        """

    def check(self, name: str) -> None:
        """Make the function once. Raises UserError where something that the settings name is missing."""
        self.make_function(name)

    def make_scorer(self, name: str, stage: RewardStage) -> "FunctionScorer":
        """A scorer by the function."""
        return FunctionScorer(self.make_function(name), name)


class CallSettings(TextTermSettings):
    """The settings of terms that call a function which may fail."""

    timeout: float | None = Field(None, gt=0, description="seconds that one call may take; unset: no limit")
    fallback: float | None = Field(
        None,
        description="score of a response that the call fails for; such responses are counted. Unset: the run stops",
    )

    @property
    def call_timeout(self) -> float | None:
        """Seconds that a call on a whole batch may take; None: no limit."""
        return self.timeout

    def make_scorer(self, name: str, stage: RewardStage) -> "FunctionScorer":
        """A scorer by the function, with its timeout and fallback."""
        return FunctionScorer(self.make_function(name), name, self.call_timeout, self.fallback)


@dataclass(frozen=True)
class FunctionScorer:
    """Scores texts by a function. With a fallback, the note `failed/NAME` is 1 where it was used, else 0."""

    function: ScoreFunction
    name: str
    timeout: float | None = None
    fallback: float | None = None
    key: str = ""

    def __call__(self, batch: TermInput, /) -> TermScores:
        import torch

        scores = call_function(
            self.function,
            prompts=batch.prompt_texts,
            responses=batch.responses,
            columns=batch.columns,
            timeout=self.timeout,
            fallback=self.fallback,
            key=self.key,
        )
        values = torch.tensor(scores.values, dtype=torch.float64)
        if self.fallback is None:
            return TermScores(values)
        failed = torch.zeros_like(values)
        failed[list(scores.failed)] = 1.0
        return TermScores(values, {f"failed/{self.name}": failed})


class ConstraintSettings(Settings):
    """A bound on a cost: the reward is maximised subject to a mean cost of at most `at_most`.

    A multiplier λ ≥ 0 grows while the mean cost is above the bound, and the score is (reward - λ · cost) / (1 + λ)
    (Dai et al. 2024, "Safe RLHF", eq. 9 and 10).
    """

    term: str = Field(description="the term that is the cost; it is not part of the sum")
    at_most: float = Field(description="bound on the mean cost")
    rate: float = Field(0.1, gt=0, description="growth of the multiplier per step, for each unit above the bound")
    start: float = Field(0.0, ge=0, description="initial value of the multiplier")
