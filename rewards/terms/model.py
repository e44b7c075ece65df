"""The reward model as a term."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from policies.errors import UserError
from rewards.terms.base import RewardStage, TermInput, TermScorer, TermScores, TermSettings
from rewards.terms.classifier import ClassifierScorer
from rewards.terms.process import STEP_LABELS


class ModelTerm(TermSettings):
    """Score of the reward model of the stage `reward`; of an ensemble, its members' scores combined."""

    kind: Literal["model"]

    def make_scorer(self, name: str, stage: RewardStage) -> TermScorer:
        """A scorer by the reward heads on the shared base model, or by the classifier that is used in their place.

        Raises:
            UserError: The reward model was trained on labels of steps, and is not read at the end of a response.
        """
        check_reads_responses(stage.facts, f"reward.terms.{name}")
        if path := stage.facts.get("classifier"):
            from rewards.classifier import Classifier

            return ClassifierScorer(Classifier(path), name, mean=stage.facts["mean"], std=stage.facts["std"])
        ensemble = stage.settings.ensemble
        return RewardHeadsScorer(ensemble.combine, ensemble.penalty or 1.0, tuple(stage.settings.attributes))


def check_reads_responses(facts: Mapping[str, Any], where: str) -> None:
    """Raise UserError where a reward model, by the facts in its folder, was trained on labels of steps.

    Args:
        facts: The content of its `stage.json`.
        where: What needs a model of whole responses, for the message.
    """
    if STEP_LABELS in facts:
        raise UserError(
            f"{where} is of kind model, and the reward model was trained on labels of steps: a term of kind process "
            "reads it at the end of each step"
        )


@dataclass(frozen=True)
class RewardHeadsScorer:
    """Combines the overall scores of the ensemble's members.

    Notes: `attribute/NAME`, the mean over members; `spread`, the members' standard deviation, where there are several.
    """

    combine: str
    penalty: float
    attributes: Sequence[str]

    def __call__(self, batch: TermInput, /) -> TermScores:
        from rewards.compose import combine, spread

        if batch.reward_outputs is None:
            raise ValueError("a term of kind model needs the outputs of the reward heads")
        outputs = batch.reward_outputs.double()
        by_member = outputs.view(len(outputs), -1, 1 + len(self.attributes))  # [B, members, 1 + A]
        notes = {}
        for i, name in enumerate(self.attributes):
            notes[f"attribute/{name}"] = by_member[:, :, 1 + i].mean(1)  # [B]
        members = by_member[:, :, 0]  # [B, members]
        if members.shape[1] > 1:
            notes["spread"] = spread(members)
        return TermScores(combine(members, self.combine, self.penalty), notes)
