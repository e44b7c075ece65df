"""The reward model as a term."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rewards.terms.base import RewardStage, TermInput, TermScorer, TermScores, TermSettings
from rewards.terms.classifier import ClassifierScorer


class ModelTerm(TermSettings):
    """Score of the reward model of the stage `reward`; of an ensemble, its members' scores combined."""

    kind: Literal["model"]

    def make_scorer(self, name: str, stage: RewardStage) -> TermScorer:
        """A scorer by the reward heads on the shared base model, or by the classifier that is used in their place."""
        if path := stage.facts.get("classifier"):
            from rewards.classifier import Classifier

            return ClassifierScorer(Classifier(path), name, mean=stage.facts["mean"], std=stage.facts["std"])
        ensemble = stage.settings.ensemble
        return RewardHeadsScorer(ensemble.combine, ensemble.penalty or 1.0, tuple(stage.settings.attributes))


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
