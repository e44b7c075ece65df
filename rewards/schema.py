"""The settings of the reward stage."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from policies.schema import Schedule, Settings
from rewards.terms.base import ConstraintSettings
from rewards.terms.model import ModelTerm
from rewards.terms.registry import Term


class FitSettings(Settings):
    """How a supervised stage (SFT or the reward model) is trained. Batch sizes are in samples: rows of its data."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="samples an optimizer step")
    tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward pass, padding too where there is any; unset: as the device likes it",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Schedule = Field("cosine", description="how the learning rate goes on from its peak, as in transformers")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises from zero")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    evaluate_every: int = Field(
        0, ge=0, description="steps between looks at the held-out loss, the best of which is kept; 0: at the end only"
    )
    patience: int | None = Field(
        None, ge=1, description="end training early after so many looks without a better held-out loss; unset: do not"
    )
    max_skipped: int = Field(
        10, ge=1, description="steps in a row with a gradient that is not finite, and is left out, at which it stops"
    )
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    max_tokens: int = Field(
        512, ge=2, description="rows with more tokens are refused or skipped, as data.on_bad_row says"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "FitSettings":
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts looks at the held-out loss: set evaluate_every too")
        return self


class EnsembleSettings(Settings):
    """Several reward models that differ in their first head and in the order of the data (Lakshminarayanan et al.
    2017): where they disagree, none is to be trusted."""

    members: int | None = Field(
        None, ge=1, description="adapters and heads on the one trunk; unset: 1, or as many as `reward.model` holds"
    )
    combine: Literal["mean", "minimum", "mean_minus_std"] = Field(
        "mean", description="from the members' normalised scores to one"
    )
    penalty: float | None = Field(None, gt=0, description="deviations taken off, with mean_minus_std; unset: 1")

    @model_validator(mode="after")
    def _consistent(self) -> "EnsembleSettings":
        if self.penalty and self.combine != "mean_minus_std":
            raise ValueError(f"`penalty` has no effect with `combine: {self.combine}`")
        return self


def _weights(attributes: dict[str, float]) -> dict[str, float]:
    for name in attributes:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is no name of an attribute: letters, digits and _ were expected")
    if attributes and not any(attributes.values()):
        raise ValueError("all weights are 0")
    return attributes


class RewardSettings(FitSettings):
    """The reward: a model trained here, one trained by an earlier run, or a ready classifier."""

    model: str | None = Field(None, description="a reward/ folder of an earlier run: used as it is, nothing is trained")
    classifier: str | None = Field(
        None, description="a ready sequence-classification model with its own tokenizer: used as it is"
    )
    trains: Literal["adapter", "head"] = Field(
        "adapter", description="of the model: adapter and head, or the head alone on the SFT model's states"
    )
    attributes: Annotated[dict[str, float], AfterValidator(_weights)] = Field(
        default_factory=dict, description="NAME: weight of a score of its own, as in {helpful: 0.7, harmless: 0.3}"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the comparisons that are taken to be wrong")
    ties: Literal["judged", "unknown"] = Field(
        "judged", description="of equal ranks: judged equally good, or their order was not asked for"
    )
    ratings: Literal["regression", "ordinal"] = Field(
        "regression", description="ratings are numbers on a line, or levels of which only the order counts"
    )
    centering: float = Field(
        0.0, ge=0, description="weight of the squared mean score of a row's responses: holds scores near 0"
    )
    ensemble: EnsembleSettings = EnsembleSettings()
    terms: dict[str, Term] = Field(
        {"model": ModelTerm(kind="model")},
        description="NAME: what the reward is the sum of; unset: the reward model alone",
    )
    constraint: ConstraintSettings | None = Field(None, description="a bound on the mean of a term that is a cost")
    normalise: int = Field(
        256, ge=0, description="SFT responses by which the score is shifted and scaled to mean 0, deviation 1; 0: off"
    )

    @property
    def weights(self) -> dict[str, float]:
        """Of the attributes in the whole score; one without a name where none are named."""
        return self.attributes or {"": 1.0}

    @property
    def has_model(self) -> bool:
        """Whether a term is the reward model."""
        return any(isinstance(term, ModelTerm) for term in self.terms.values())

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSettings":
        if self.model and self.classifier:
            raise ValueError("give `model` or `classifier`, not both")
        on_trunk = {"ensemble": self.ensemble != EnsembleSettings(), "attributes": bool(self.attributes)}
        for name in (name for name, given in on_trunk.items() if given and self.classifier):
            raise ValueError(f"`{name}` is of a reward model on the trunk, and `classifier` is none")
        alone = self.ensemble.members == 1 or (self.ensemble.members is None and not self.model)
        if alone and self.ensemble.combine != "mean":
            raise ValueError(f"ensemble.combine `{self.ensemble.combine}` needs more than one of ensemble.members")
        return self

    @model_validator(mode="after")
    def _terms_add_up(self) -> "RewardSettings":
        if not self.terms:
            raise ValueError("`terms` is empty")
        if odd := next((name for name in self.terms if not name.isidentifier()), None):
            raise ValueError(f"terms: {odd!r} is no name: letters, digits and _ were expected")
        if sum(isinstance(term, ModelTerm) for term in self.terms.values()) > 1:
            raise ValueError("terms: the reward model is in more than one of them")
        if not self.normalise and any(term.normalise == "sft" for term in self.terms.values()):
            raise ValueError("terms: `normalise: sft` is by `normalise` SFT responses, and that is 0")
        if not self.has_model and self.attributes:
            raise ValueError("terms: none is of kind `model`, so that `attributes` has no effect")
        if not self.has_model and (self.model or self.classifier):
            raise ValueError("terms: none is of kind `model`, so that `model` and `classifier` have no effect")
        if self.constraint:
            cost = self.constraint.term
            if cost not in self.terms:
                raise ValueError(f"constraint.term: {cost!r} is none of the terms {', '.join(self.terms)}")
            if self.terms[cost].weight != 1.0:
                raise ValueError(f"terms.{cost}.weight has no effect: as the constraint's cost it is weighed by λ")
            if self.terms[cost].normalise != "no":
                raise ValueError(f"terms.{cost}.normalise: a bound on a cost is on the cost as it is: remove it")
            if len(self.terms) == 1:
                raise ValueError("constraint: there is no term besides the cost")
        return self
