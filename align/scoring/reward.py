"""From trajectories and what the roles say of them to final scores, by parts that are chosen before the loop starts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.text.tokenization import decode_response, prompt_text
from rewards.classifier import Classifier
from rewards.compose import Composition, combine, spread
from rewards.schema import EnsembleSettings
from rewards.terms import LengthTerm
from rewards.user_functions import ScoreFunction, Scores, call_function
from rollouts.trajectory import RoleOutputs, Trajectory

Notes = dict[str, Tensor]
"""More that is known of the trajectories `[B]`, by name, to be logged."""

TermScore = Callable[[Sequence[Trajectory], Sequence[RoleOutputs]], tuple[Tensor, Notes]]
"""What one term says of trajectories `[B]`, by their texts or by the outputs of the trunk's reward heads."""

TrainingScorer = Callable[[Sequence[Trajectory]], list[RoleOutputs]]
"""Verdicts on trajectories."""


Rescore = Callable[[], list[RoleOutputs]]
"""Verdicts on the trajectories that were asked about, as the reward now composes them."""

EvaluationScorer = Callable[[Sequence[Trajectory]], Rescore]


class RoleScorer(Protocol):
    """What the roles that are asked say of trajectories."""

    def __call__(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str], /
    ) -> list[RoleOutputs]: ...


Gold = Callable[[Sequence[Trajectory]], list[float]]
"""The true score of each trajectory, where the user has one."""


@dataclass(frozen=True)
class Reward:
    """The terms by name, and their composition."""

    terms: Mapping[str, TermScore]
    composition: Composition

    def ask(self, trajectories: Sequence[Trajectory], scored: list[RoleOutputs]) -> Rescore:
        """What gives the verdicts, with score and notes, when it is called: terms are asked now and composed then."""
        raw, notes = self.raw(trajectories, scored)
        return lambda: _noted(scored, *self.composition.score(raw), notes)

    def learn(self, trajectories: Sequence[Trajectory], scored: list[RoleOutputs]) -> list[RoleOutputs]:
        """The same of a batch of training, at once; the composition learns from it."""
        raw, notes = self.raw(trajectories, scored)
        return _noted(scored, *self.composition.learn(raw), notes)

    def raw(self, trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> tuple[dict[str, Tensor], Notes]:
        """What each term says, before it is normalised, and the notes of all."""
        raw: dict[str, Tensor] = {}
        notes: Notes = {}
        for name, term in self.terms.items():
            raw[name], own = term(trajectories, scored)
            notes |= {key.format(name=name): values for key, values in own.items()}
        return raw, notes


def _noted(scored: list[RoleOutputs], total: Tensor, parts: Mapping[str, Tensor], notes: Notes) -> list[RoleOutputs]:
    if len(parts) > 1:
        notes = {f"term/{name}": values for name, values in parts.items()} | notes
    rows = [dict(zip(notes, row, strict=True)) for row in zip(*(n.tolist() for n in notes.values()), strict=True)]
    rows = rows or [{} for _ in scored]
    return [replace(v, score=s, notes=n) for v, s, n in zip(scored, total.tolist(), rows, strict=True)]


def model_term(ensemble: EnsembleSettings, attributes: Sequence[str]) -> TermScore:
    """The reward roles on the trunk: outputs are, for each member, the whole score and that of each attribute."""

    def term(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> tuple[Tensor, Notes]:
        outputs = torch.stack([output.reward_outputs for output in scored]).double()
        outputs = outputs.view(len(scored), -1, 1 + len(attributes))
        notes = {f"attribute/{name}": outputs[:, :, 1 + i].mean(1) for i, name in enumerate(attributes)}
        members = outputs[:, :, 0]
        if members.shape[1] > 1:
            notes["spread"] = spread(members)
        return combine(members, ensemble.combine, ensemble.penalty or 1.0), notes

    return term


def classifier_term(
    classifier: Classifier, tokenizer: PreTrainedTokenizerBase, mean: float = 0.0, std: float = 1.0
) -> TermScore:
    """A ready classifier's scores of the text, shifted and scaled."""

    def term(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> tuple[Tensor, Notes]:
        responses = [decode_response(tokenizer, t.response_ids) for t in trajectories]
        scores = classifier.score([t.request.prompt for t in trajectories], responses)
        return (scores - mean) / std, {}

    return term


def function_term(
    function: ScoreFunction, tokenizer: PreTrainedTokenizerBase, timeout: float | None, fallback: float | None
) -> TermScore:
    """A function of texts and columns. Where it fails, rows get the fallback, and a note of it."""

    def term(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> tuple[Tensor, Notes]:
        scores = _call(function, tokenizer, trajectories, timeout, fallback)
        values = torch.tensor(scores.values, dtype=torch.float64)
        if fallback is None:
            return values, {}
        failed = torch.zeros_like(values)
        failed[list(scores.failed)] = 1.0
        return values, {"failed/{name}": failed}

    return term


def length_term(settings: LengthTerm) -> TermScore:
    """0, falling to -1 as the response's tokens come to the most that are wanted."""

    def term(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> tuple[Tensor, Notes]:
        over = torch.tensor([t.length - settings.max_tokens for t in trajectories], dtype=torch.float64)
        if not settings.window:
            return -(over > 0).double(), {}
        return -(1 + over / settings.window).clamp(0, 1), {}

    return term


def gold_score(function: ScoreFunction, tokenizer: PreTrainedTokenizerBase) -> Gold:
    """The user's function as a score of trajectories."""
    return lambda trajectories: _call(function, tokenizer, trajectories, None, None).values


def _call(
    function: ScoreFunction,
    tokenizer: PreTrainedTokenizerBase,
    trajectories: Sequence[Trajectory],
    timeout: float | None,
    fallback: float | None,
) -> Scores:
    prompts = [prompt_text(t.request.prompt) for t in trajectories]
    responses = [decode_response(tokenizer, t.response_ids) for t in trajectories]
    return call_function(function, prompts, responses, [t.request.columns for t in trajectories], timeout, fallback)
