"""Computes scores from trajectories and role outputs, by terms that are chosen before the loop starts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.text.tokenization import decode_response
from rewards.calls import Arguments, Caller, score_batch
from rewards.children.pool import FunctionPool
from rewards.children.source import FunctionSource
from rewards.compose import Composition
from rewards.terms.base import LONGEST_CALL, FunctionScorer, TermInput, TermScorer
from rollouts.trajectory import RoleOutputs, Trajectory

Notes = dict[str, Tensor]
"""Further values of the trajectories, `[B]` each, by the name under which they are logged."""

TrainingScorer = Callable[[Sequence[Trajectory]], list[RoleOutputs]]
"""Returns the role outputs of a training batch, with score and notes; updates the reward's composition."""

Rescore = Callable[[], list[RoleOutputs]]
"""Returns the role outputs of trajectories, with score and notes as the reward composes them when it is called."""

EvaluationScorer = Callable[[Sequence[Trajectory]], Rescore]
"""Runs roles and terms on trajectories immediately; the scores are composed whenever the result is called."""

GoldScorer = Callable[[Sequence[Trajectory]], list[float]]
"""Returns the true score of each trajectory."""


class RoleScorer(Protocol):
    """The forward passes of the requested roles on trajectories."""

    def __call__(
        self, trajectories: Sequence[Trajectory], requested_roles: Collection[str], /
    ) -> list[RoleOutputs]: ...


@dataclass(frozen=True)
class Reward:
    """The reward of a response: the scores of its terms, composed into one.

    Attributes:
        terms: The scorer of each term by name.
        composition: Normalises, clips, weights and adds up the scores of the terms.
        tokenizer: Tokenizer of the base model, which decodes responses.
    """

    terms: Mapping[str, TermScorer]
    composition: Composition
    tokenizer: PreTrainedTokenizerBase

    def score_for_evaluation(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> Rescore:
        """Score trajectories by all terms immediately, and compose the scores whenever the result is called.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            A function that returns the role outputs `[B]` with score and notes. The composition is not updated.
        """
        raw, notes = self.raw_scores(trajectories, outputs)

        def rescore() -> list[RoleOutputs]:
            total, parts = self.composition.score(raw)
            return _with_scores(outputs, total, _term_notes(parts) | notes)

        return rescore

    def score_and_update(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> list[RoleOutputs]:
        """Score a training batch, and update the composition with its scores.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            The role outputs `[B]` with score and notes.
        """
        raw, notes = self.raw_scores(trajectories, outputs)
        total, parts = self.composition.score_and_update(raw)
        return _with_scores(outputs, total, _term_notes(parts) | notes)

    def raw_scores(
        self, trajectories: Sequence[Trajectory], outputs: Sequence[RoleOutputs]
    ) -> tuple[dict[str, Tensor], Notes]:
        """Score trajectories by all terms.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            Scores `[B]` float64 by term, before they are normalised, clipped and weighted; and the notes of all terms.
        """
        batch = term_input(trajectories, self.tokenizer, outputs)
        raw: dict[str, Tensor] = {}
        notes: Notes = {}
        for name, score in self.terms.items():
            scores = score(batch)
            raw[name] = scores.values
            notes |= scores.notes
        return raw, notes

    def close(self) -> None:
        """End the processes in which terms call functions."""
        for scorer in self.terms.values():
            if isinstance(scorer, FunctionScorer):
                scorer.close()


def term_input(
    trajectories: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, outputs: Sequence[RoleOutputs] = ()
) -> TermInput:
    """The input of the terms: texts, columns, lengths and reward-head outputs of trajectories."""
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


def gold_function(where: str) -> FunctionPool:
    """The process that calls the user's function `evaluation.gold`, which starts at the first call."""
    return FunctionPool(FunctionSource(where, "evaluation.gold"), timeout=LONGEST_CALL)


def gold_scorer(caller: Caller, tokenizer: PreTrainedTokenizerBase, name: str = "evaluation.gold") -> GoldScorer:
    """Wrap the user's function as a scorer of trajectories."""

    def score(trajectories: Sequence[Trajectory]) -> list[float]:
        batch = term_input(trajectories, tokenizer)
        arguments = Arguments(batch.prompt_texts, batch.responses, batch.columns)
        return score_batch(caller, arguments, name=name).values

    return score


def _term_notes(parts: Mapping[str, Tensor]) -> Notes:
    """The scores of the terms as notes; none for a single term, whose score is the total."""
    return {f"term/{name}": values for name, values in parts.items()} if len(parts) > 1 else {}


def _with_scores(outputs: Sequence[RoleOutputs], total: Tensor, notes: Notes) -> list[RoleOutputs]:
    """The role outputs `[B]` with the scores `[B]` and the notes, `[B]` each, filled in."""
    columns = {name: values.tolist() for name, values in notes.items()}
    scored: list[RoleOutputs] = []
    for i, (output, score) in enumerate(zip(outputs, total.tolist(), strict=True)):
        response_notes = {name: values[i] for name, values in columns.items()}
        scored.append(replace(output, score=score, notes=response_notes))
    return scored
