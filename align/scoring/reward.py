"""From trajectories and the outputs of the roles to scores, by terms that are chosen before the loop starts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.text.tokenization import decode_response
from rewards.compose import Composition
from rewards.terms.base import TermInput, TermScorer
from rewards.user_functions import ScoreFunction, call_function
from rollouts.trajectory import RoleOutputs, Trajectory

Notes = dict[str, Tensor]
"""Further figures of the trajectories `[B]`, by the name under which they are logged."""

TrainingScorer = Callable[[Sequence[Trajectory]], list[RoleOutputs]]
"""Role outputs of a training batch, with score and notes; updates the reward's composition."""

Rescore = Callable[[], list[RoleOutputs]]
"""Role outputs of trajectories that were scored before, with score and notes as the reward composes them now."""

EvaluationScorer = Callable[[Sequence[Trajectory]], Rescore]
"""Runs roles and terms on trajectories at once; their scores are composed whenever the result is called."""

GoldScorer = Callable[[Sequence[Trajectory]], list[float]]
"""The true score of each trajectory, where the user has one."""


class RoleScorer(Protocol):
    """The forward passes of the requested roles on trajectories."""

    def __call__(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str], /
    ) -> list[RoleOutputs]: ...


@dataclass(frozen=True)
class Reward:
    """The scorers of the terms by name, and what composes their scores to one."""

    terms: Mapping[str, TermScorer]
    composition: Composition
    tokenizer: PreTrainedTokenizerBase

    def score_for_evaluation(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> Rescore:
        """Score trajectories by all terms now, and compose the scores whenever the result is called.

        Args:
            trajectories: `[B]`.
            outputs: Their role outputs `[B]`, of the reward role at least.

        Returns:
            A function that returns the role outputs `[B]` with score and notes. The composition is not updated.
        """
        raw, notes = self.raw_scores(trajectories, outputs)

        def rescore() -> list[RoleOutputs]:
            total, parts = self.composition.score(raw)
            return _with_scores(outputs, total, _named(parts) | notes)

        return rescore

    def score_and_update(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> list[RoleOutputs]:
        """Score a training batch and update the composition by it.

        Args:
            trajectories: `[B]`.
            outputs: Their role outputs `[B]`, of the reward role at least.

        Returns:
            The role outputs `[B]` with score and notes.
        """
        raw, notes = self.raw_scores(trajectories, outputs)
        total, parts = self.composition.score_and_update(raw)
        return _with_scores(outputs, total, _named(parts) | notes)

    def raw_scores(
        self, trajectories: Sequence[Trajectory], outputs: Sequence[RoleOutputs]
    ) -> tuple[dict[str, Tensor], Notes]:
        """Scores `[B]` float64 by term, before they are normalised, clipped and weighted; the notes of all terms."""
        batch = term_input(trajectories, self.tokenizer, outputs)
        raw: dict[str, Tensor] = {}
        notes: Notes = {}
        for name, score in self.terms.items():
            scores = score(batch)
            raw[name] = scores.values
            notes |= scores.notes
        return raw, notes


def term_input(
    trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, outputs: Sequence[RoleOutputs] = ()
) -> TermInput:
    """What terms score: the texts, columns, lengths and reward-head outputs of trajectories."""
    requests = [trajectory.request for trajectory in trajectories]

    def decode_responses() -> list[str]:
        return [decode_response(tokenizer, trajectory.response_ids) for trajectory in trajectories]

    reward_outputs = None
    if outputs and outputs[0].reward_outputs.numel():
        reward_outputs = torch.stack([output.reward_outputs for output in outputs])  # [B, C]
    columns = [request.columns for request in requests]
    response_lengths = [trajectory.length for trajectory in trajectories]
    return TermInput(
        prompts=[request.prompt for request in requests],
        decode_responses=decode_responses,
        columns=columns,
        response_lengths=response_lengths,
        reward_outputs=reward_outputs,
    )


def gold_scorer(function: ScoreFunction, tokenizer: PreTrainedTokenizerBase) -> GoldScorer:
    """The user's function as a score of trajectories."""

    def score(trajectories: Sequence[Trajectory]) -> list[float]:
        batch = term_input(trajectories, tokenizer)
        return call_function(function, batch.prompt_texts, batch.responses, batch.columns).values

    return score


def _named(parts: Mapping[str, Tensor]) -> Notes:
    """The notes of the terms' own scores; a single term's is the score itself."""
    return {f"term/{name}": values for name, values in parts.items()} if len(parts) > 1 else {}


def _with_scores(outputs: Sequence[RoleOutputs], total: Tensor, notes: Notes) -> list[RoleOutputs]:
    """Role outputs `[B]` with the scores `[B]` and the notes `[B]` by name."""
    columns = {name: values.tolist() for name, values in notes.items()}
    scored: list[RoleOutputs] = []
    for i, (output, score) in enumerate(zip(outputs, total.tolist(), strict=True)):
        own_notes = {name: values[i] for name, values in columns.items()}
        scored.append(replace(output, score=score, notes=own_notes))
    return scored
