"""A pretrained sequence-classification model as a term."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rewards.terms.base import RewardStage, TermInput, TermScores, TermSettings

if TYPE_CHECKING:
    from rewards.classifier import Classifier


class ClassifierTerm(TermSettings):
    """Score of the sequence-classification model at `path`, with its own tokenizer and template."""

    kind: Literal["classifier"]
    path: str

    def check(self, name: str) -> None:
        """Check the model folder. Raises UserError where `path` is not one."""
        from policies.files.base_model import check_model_folder

        check_model_folder(self.path)

    def make_scorer(self, name: str, stage: RewardStage) -> "ClassifierScorer":
        """Load the model."""
        from rewards.classifier import Classifier

        return ClassifierScorer(Classifier(self.path, key=f"reward.terms.{name}.path"), name)


@dataclass(frozen=True)
class ClassifierScorer:
    """Scores by a classifier, normalised: (score - mean) / std.

    Where its model has limited positions, the note `shortened/NAME` is 1 for prompts whose start did not fit, else 0.
    """

    classifier: "Classifier"
    name: str
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, batch: TermInput, /) -> TermScores:
        scores, shortened = self.classifier.score_and_flag(batch.prompts, batch.responses)  # [B] float32, [B] float64
        notes = {} if self.classifier.encoder.room is None else {f"shortened/{self.name}": shortened}
        return TermScores(((scores - self.mean) / self.std).double(), notes)
