"""Computes scores from trajectories and role outputs, by terms that are chosen before the loop starts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policies.errors import UserError
from policies.text.alignment import TextAlignment
from policies.text.tokenization import decode_response
from rewards.calls import Arguments, Caller, score_batch
from rewards.children.pool import FunctionPool
from rewards.children.source import FunctionSource
from rewards.compose import Composition
from rewards.terms.base import LONGEST_CALL, FunctionScorer, TermInput, TermScorer, TermScores
from rollouts.trajectory import RoleOutputs, Trajectory

RIGHT_NOTE = "right/"
"""What the name of a note begins with that says whether a response is right by a term, 1 or 0."""

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
        verifiable: The terms whose scores say whether a response is right.
    """

    terms: Mapping[str, TermScorer]
    composition: Composition
    tokenizer: PreTrainedTokenizerBase
    verifiable: Collection[str] = ()

    def score_for_evaluation(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> Rescore:
        """Score trajectories by all terms immediately, and compose the scores whenever the result is called.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            A function that returns the role outputs `[B]` with score and notes. The composition is not updated. Among
            the notes is `right/NAME` of each verifiable term: 1 for a right response, else 0.
        """
        scores = self.term_scores(trajectories, outputs)
        for name in self.verifiable:
            scores[name] = _with_verdict(scores[name], name)

        def rescore() -> list[RoleOutputs]:
            factors = self.composition.factors
            total, parts = self.composition.score(_values(scores))
            return _composed(outputs, scores, factors=factors, total=total, parts=parts)

        return rescore

    def score_and_update(self, trajectories: Sequence[Trajectory], outputs: list[RoleOutputs]) -> list[RoleOutputs]:
        """Score a training batch, and update the composition with its scores.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            The role outputs `[B]` with score and notes.
        """
        scores = self.term_scores(trajectories, outputs)
        factors = self.composition.factors  # before the update, as they are in the total
        total, parts = self.composition.score_and_update(_values(scores))
        return _composed(outputs, scores, factors=factors, total=total, parts=parts)

    def raw_scores(self, trajectories: Sequence[Trajectory], outputs: Sequence[RoleOutputs]) -> dict[str, Tensor]:
        """Scores `[B]` float64 by term, before they are normalised, clipped and weighted."""
        return _values(self.term_scores(trajectories, outputs))

    def term_scores(self, trajectories: Sequence[Trajectory], outputs: Sequence[RoleOutputs]) -> dict[str, TermScores]:
        """Score trajectories by all terms.

        Args:
            trajectories: `[B]`.
            outputs: `[B]`, their role outputs, those of the reward role at least.

        Returns:
            The scores by term, before they are normalised, clipped and weighted.
        """
        batch = term_input(trajectories, self.tokenizer, outputs)
        return {name: score(batch) for name, score in self.terms.items()}

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

    def align_text(index: int) -> TextAlignment:
        return TextAlignment(tokenizer, trajectories[index].response_ids)

    reward_outputs = None
    if outputs and outputs[0].reward_outputs.numel():
        reward_outputs = torch.stack([output.reward_outputs for output in outputs])  # [B, C]
    token_scores: list[Tensor] = []
    if outputs and outputs[0].token_scores.numel():
        token_scores = [output.token_scores for output in outputs]  # [T] each
    columns = [request.columns for request in requests]
    response_lengths = [trajectory.length for trajectory in trajectories]
    return TermInput(
        prompts=[request.prompt for request in requests],
        decode_responses=decode_responses,
        columns=columns,
        response_lengths=response_lengths,
        reward_outputs=reward_outputs,
        align_text=align_text,
        token_scores=token_scores,
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


def _with_verdict(scores: TermScores, name: str) -> TermScores:
    """The scores of a verifiable term with a note that says which responses are right; a failed call is not."""
    failed = scores.notes.get(f"failed/{name}", torch.zeros_like(scores.values)) == 1  # [B]
    right = (scores.values == 1) & ~failed  # [B]
    other = scores.values[~(right | failed | (scores.values == 0))]
    if len(other):
        raise UserError(
            f"reward.terms.{name} is verifiable: 1 for a right response or 0 for a wrong one was expected, and it has "
            f"given {float(other[0]):g}; set verifiable to false where it is no rule"
        )
    return replace(scores, notes=scores.notes | {f"{RIGHT_NOTE}{name}": right.double()})


def _values(scores: Mapping[str, TermScores]) -> dict[str, Tensor]:
    """The scores `[B]` by term."""
    return {name: term.values for name, term in scores.items()}


def _composed(
    outputs: Sequence[RoleOutputs],
    scores: Mapping[str, TermScores],
    factors: Mapping[str, float],
    total: Tensor,
    parts: Mapping[str, Tensor],
) -> list[RoleOutputs]:
    """The role outputs `[B]` with score, step rewards and notes filled in.

    Args:
        outputs: `[B]`.
        scores: The scores of the terms, as they return them.
        factors: The factor of each term in the composed scores.
        total: The composed scores `[B]`.
        parts: The scores `[B]` of each term, normalised and clipped.
    """
    steps = {name: term.step_rewards for name, term in scores.items() if term.step_rewards}
    notes = _term_notes(parts, steps)
    for term in scores.values():
        notes |= term.notes
    if not steps:
        return _with_scores(outputs, total, notes)
    outcome = torch.zeros_like(total)  # [B]
    for name, values in parts.items():
        if name not in steps:
            outcome = outcome + factors[name] * values
    step_rewards = _step_rewards(steps, factors)
    # The score contains the step rewards as float32, so that the outcome is what is left without them.
    step_totals = [float(rewards.double().sum()) for rewards in step_rewards]
    scored = _with_scores(outputs, outcome + torch.tensor(step_totals, dtype=torch.float64), notes)
    return [replace(output, step_rewards=rewards) for output, rewards in zip(scored, step_rewards, strict=True)]


def _step_rewards(steps: Mapping[str, Sequence[Tensor]], factors: Mapping[str, float]) -> list[Tensor]:
    """The sum over the terms of the factor times the rewards of each token: `[T]` float32 of each response."""
    weighted = []
    for name, responses in steps.items():
        weighted.append([factors[name] * rewards for rewards in responses])
    return [torch.stack(rewards).sum(0).float() for rewards in zip(*weighted, strict=True)]  # [terms, T] -> [T]


def _term_notes(parts: Mapping[str, Tensor], steps: Collection[str]) -> Notes:
    """The scores of the terms as notes; none for a single term, whose score is the total, unless it is of steps."""
    notes: Notes = {}
    for name, values in parts.items():
        if name in steps:
            notes[f"steps/{name}"] = values
        elif len(parts) > 1:
            notes[f"term/{name}"] = values
    return notes


def _with_scores(outputs: Sequence[RoleOutputs], total: Tensor, notes: Notes) -> list[RoleOutputs]:
    """The role outputs `[B]` with the scores `[B]` and the notes, `[B]` each, filled in."""
    columns = {name: values.tolist() for name, values in notes.items()}
    scored: list[RoleOutputs] = []
    for i, (output, score) in enumerate(zip(outputs, total.tolist(), strict=True)):
        response_notes = {name: values[i] for name, values in columns.items()}
        scored.append(replace(output, score=score, notes=response_notes))
    return scored
