"""The base classes of reward terms: their settings, the batch that they score, and their scorers."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator

from policies.errors import UserError
from policies.schema import Settings
from rewards.calls import Arguments, Caller, InProcess, Scores, score_batch
from rewards.children.source import FunctionSource
from rewards.user_functions import ScoreFunction

if TYPE_CHECKING:  # settings are loaded without torch, transformers and multiprocessing
    from torch import Tensor

    from policies.text.alignment import TextAlignment
    from policies.text.tokenization import Prompt
    from rewards.children.pool import FunctionPool
    from rewards.schema import RewardSettings

log = logging.getLogger(__name__)

LONGEST_CALL = 3600.0
"""Default time limit of a call in seconds: far above what a batch takes, so that only a call that hangs meets it."""


def _no_alignment(index: int) -> "TextAlignment":
    raise ValueError("this batch is of texts alone, without tokens")


@dataclass(frozen=True)
class TermInput:
    """A batch of B responses, with everything that a term may use to score them.

    Attributes:
        prompts: `[B]`, as in the data: texts or lists of messages.
        decode_responses: Returns the texts of the responses `[B]`; called at most once, when a term reads them.
        columns: `[B]`, the other columns of each prompt's row.
        response_lengths: `[B]`, in tokens.
        align_text: Returns the alignment of a response's text, by its index, with its tokens.
        reward_outputs: `[B, C]` float32 of the reward heads on the shared base model: for each member of the ensemble
            its overall score, then its score of each attribute. None where the reward has no term of kind `model`, or
            its model is a pretrained classifier.
        token_scores: `[B]`, of each response `[T]` float32 of the head of the process reward model on the shared base
            model, at each token; empty where the reward has no term of kind `process`.
    """

    prompts: Sequence["Prompt"]
    decode_responses: Callable[[], Sequence[str]]
    columns: Sequence[Mapping[str, Any]]
    response_lengths: Sequence[int]
    reward_outputs: "Tensor | None" = None
    align_text: Callable[[int], "TextAlignment"] = _no_alignment
    token_scores: "Sequence[Tensor]" = ()

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
        step_rewards: Rewards of the tokens of each response, `[T]` float64, whose sum is its value; empty where the
            score is of the response as a whole.
    """

    values: "Tensor"
    notes: dict[str, "Tensor"] = field(default_factory=dict)
    step_rewards: "Sequence[Tensor]" = ()


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

    @property
    def is_verifiable(self) -> bool:
        """Whether the score, before it is normalised, clipped and weighted, says by a rule that a response is right, 1,
        or wrong, 0; then an evaluation reports its accuracy and pass@k.
        """
        return False

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
        function = self.make_function(name)
        return FunctionScorer(InProcess(function), name, getattr(function, "__name__", "the score function"))


class FallbackSettings(TermSettings):
    """What a term does about a response for which its call fails."""

    fallback: float | None = Field(
        None,
        description="score of a response that the call fails for; such responses are counted. Unset: the run stops",
    )


class CallSettings(TextTermSettings, FallbackSettings):
    """The settings of terms that call a function which may fail, in this process."""

    def make_scorer(self, name: str, stage: RewardStage) -> "FunctionScorer":
        """A scorer by the function, with its fallback."""
        return replace(super().make_scorer(name, stage), fallback=self.fallback)


class ChildSettings(FallbackSettings):
    """The settings of terms that call a function in processes of its own, which are killed at the timeout."""

    timeout: float | None = Field(
        LONGEST_CALL, gt=0, description="seconds after which a call fails and its process is killed; null: no limit"
    )
    processes: int = Field(
        1,
        ge=1,
        description="processes that share a batch; each gets a part, in which responses to one prompt stay together",
    )
    memory_gb: float | None = Field(
        None, gt=0, description="gigabytes that a process may allocate before it gets a MemoryError; unset: no limit"
    )

    @abstractmethod
    def source(self, name: str) -> FunctionSource:
        """What the processes load. Raises UserError where something that the settings name is missing."""

    def make_pool(self, name: str) -> "FunctionPool":
        """The processes, which start at the first call."""
        from rewards.children.pool import FunctionPool

        return FunctionPool(self.source(name), self.processes, self.timeout)

    def check(self, name: str) -> None:
        """Load the function once. Raises UserError where that fails."""
        self.make_pool(name).check()

    def make_scorer(self, name: str, stage: RewardStage) -> "FunctionScorer":
        """A scorer by the function; `close` ends its processes."""
        pool = self.make_pool(name)
        label = f"{pool.source.key}: {pool.source.where}"
        return FunctionScorer(pool, name, label, self.fallback, tuple(self.columns))


@dataclass(frozen=True)
class FunctionScorer:
    """Scores texts by a function. With a fallback, the note `failed/NAME` is 1 where it was used, else 0.

    Attributes:
        caller: Calls the function.
        name: The term's name.
        label: The setting and the function, for messages.
        fallback: Score of a response for which the call fails; None: that is an error.
        columns: The columns that every row must have.
    """

    caller: Caller
    name: str
    label: str
    fallback: float | None = None
    columns: tuple[str, ...] = ()
    _reported: set[str] = field(default_factory=set, compare=False)

    def __call__(self, batch: TermInput, /) -> TermScores:
        import torch

        scores = self.call(batch, self.fallback)
        return TermScores(torch.tensor(scores.values, dtype=torch.float64), self.failure_notes(scores))

    def call(self, batch: TermInput, fallback: Any) -> Scores:
        """Call the function on a batch; a response that the call fails for gets the fallback, unless that is None."""
        for row in batch.columns:
            for column in self.columns:
                if column not in row:
                    raise UserError(
                        f"{self.label}: prompt rows have no column {column!r}; they have {', '.join(row) or 'none'}"
                    )
        arguments = Arguments(batch.prompt_texts, batch.responses, batch.columns)
        scores = score_batch(self.caller, arguments, fallback, self.label)
        self._report(scores)
        return scores

    def failure_notes(self, scores: Scores) -> dict[str, "Tensor"]:
        """The note that says where the fallback was used; none without a fallback."""
        import torch

        if self.fallback is None:
            return {}
        failed = torch.zeros(len(scores.values), dtype=torch.float64)
        failed[list(scores.failed)] = 1.0
        return {f"failed/{self.name}": failed}

    def close(self) -> None:
        """End the processes in which the function is called; a further call starts new ones."""
        self.caller.close()

    def _report(self, scores: Scores) -> None:
        """Say once why a response got the fallback; `reward/failed/NAME` says how often."""
        if scores.failed and not self._reported:
            self._reported.add(scores.reason)
            log.warning(
                "%s %s; such responses get the fallback, %g, and are counted in reward/failed/%s",
                self.label,
                scores.reason,
                self.fallback,
                self.name,
            )
