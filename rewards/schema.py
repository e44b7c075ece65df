"""The settings of the reward stage."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from policies.schema import OptimizerSettings, Schedule, Settings, unread_settings
from rewards.constraint import ConstraintSettings
from rewards.terms.model import ModelTerm
from rewards.terms.process import ProcessTerm
from rewards.terms.registry import Term


class FitSettings(OptimizerSettings):
    """How a supervised stage (SFT or the reward model) is trained. Batch sizes count rows of data."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="most samples per optimizer step; an epoch has batches of even size")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Schedule = Field("cosine", description="decay of the learning rate after warmup, as in transformers")
    warmup: float = Field(
        0.03, ge=0, lt=1, description="share of the steps over which the learning rate rises from zero"
    )
    ranks: int | None = Field(
        None,
        ge=0,
        description="Ray actors, one per rank; 0: one rank in the controller's process; unset: as learner.ranks",
    )
    zero: Literal[0, 1, 2, 3] | None = Field(None, description="ZeRO stage; unset: as learner.zero")
    evaluate_every: int = Field(
        0,
        ge=0,
        description="steps between evaluations of the held-out loss, the best of which is kept; 0: at the end only",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations without a better held-out loss after which training ends early; unset: never",
    )
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    max_tokens: int = Field(
        512, ge=2, description="rows with more tokens are refused or skipped, depending on data.on_bad_row"
    )

    def optimizer_steps(self, examples: int) -> int:
        """Optimizer steps of a training run on this many examples, in ⌈examples / batch_size⌉ batches per epoch."""
        return math.ceil(math.ceil(examples / self.batch_size) * self.epochs)

    @model_validator(mode="after")
    def _consistent(self) -> "FitSettings":
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations of the held-out loss: set evaluate_every too")
        return self


class EnsembleSettings(Settings):
    """Several reward models that differ in their initial heads and in the order of the data.

    Where they disagree, none can be trusted (Lakshminarayanan et al. 2017).
    """

    members: int | None = Field(
        None,
        ge=1,
        description="adapters and heads on the shared base model; unset: 1, or as many as `reward.model` has",
    )
    combine: Literal["mean", "minimum", "mean_minus_std"] = Field(
        "mean", description="how the members' normalised scores become one"
    )
    penalty: float | None = Field(None, gt=0, description="standard deviations subtracted by mean_minus_std; unset: 1")

    @model_validator(mode="after")
    def _consistent(self) -> "EnsembleSettings":
        if self.penalty and self.combine != "mean_minus_std":
            raise unread_settings(f"`penalty` has no effect with `combine: {self.combine}`", "penalty")
        return self


def _weights(attributes: dict[str, float]) -> dict[str, float]:
    for name in attributes:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a valid name of an attribute: letters, digits and _ were expected")
    if attributes and not any(attributes.values()):
        raise ValueError("all weights are 0")
    return attributes


class RewardSettings(FitSettings):
    """The reward: a model trained by this run, one trained by an earlier run, or a pretrained classifier."""

    model: str | None = Field(None, description="the reward/ folder of an earlier run: used without further training")
    classifier: str | None = Field(
        None,
        description="a pretrained sequence-classification model with its own tokenizer: used without further training",
    )
    trains: Literal["adapter", "head"] = Field(
        "adapter", description="adapter and head of the model, or the head alone on the SFT model's hidden states"
    )
    attributes: Annotated[dict[str, float], AfterValidator(_weights)] = Field(
        default_factory=dict,
        description="NAME: weight of the attribute's score in the overall one, as in {helpful: 0.7, harmless: 0.3}",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of the comparisons, or labels of steps, that are assumed to be wrong"
    )
    ties: Literal["judged", "unknown"] = Field(
        "judged", description="what equal ranks mean: judged equally good, or of unknown order"
    )
    ratings: Literal["regression", "ordinal"] = Field(
        "regression", description="ratings are numbers, or levels of which only the order matters"
    )
    centering: float = Field(
        0.0, ge=0, description="weight of the squared mean score of a row's responses: keeps scores near 0"
    )
    ensemble: EnsembleSettings = EnsembleSettings()
    terms: dict[str, Term] = Field(
        {"model": ModelTerm(kind="model")},
        description="NAME: a term of the sum that is the reward; unset: the reward model alone",
    )
    constraint: ConstraintSettings | None = Field(None, description="a bound on the mean of a term that is a cost")
    normalise: int = Field(
        256,
        ge=0,
        description="SFT responses over which the score is shifted and scaled to mean 0, standard deviation 1, but for "
        "the probabilities of a process reward model; 0: off",
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the attributes in the overall score; `{"": 1.0}` without named attributes."""
        return self.attributes or {"": 1.0}

    @property
    def model_term(self) -> str | None:
        """The name of the term that is the reward model; None where there is none."""
        names = [name for name, term in self.terms.items() if isinstance(term, ModelTerm | ProcessTerm)]
        return names[0] if names else None

    @property
    def has_model(self) -> bool:
        """Whether the reward model is one of the terms."""
        return self.model_term is not None

    @property
    def process(self) -> ProcessTerm | None:
        """The term that reads the reward model at the end of each step; None: it is read at the end of a response."""
        return next((term for term in self.terms.values() if isinstance(term, ProcessTerm)), None)

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSettings":
        if self.model and self.classifier:
            raise unread_settings("give `model` or `classifier`, not both", "model", "classifier")
        if self.classifier and self.ensemble != EnsembleSettings():
            raise unread_settings("`ensemble` has no effect with `classifier`, which is a single model", "ensemble")
        if self.classifier and self.attributes:
            raise unread_settings(
                "`attributes` has no effect with `classifier`, which has a single score", "attributes"
            )
        single = self.ensemble.members == 1 or (self.ensemble.members is None and not self.model)
        if single and self.ensemble.combine != "mean":
            raise ValueError(f"ensemble.combine `{self.ensemble.combine}` needs ensemble.members of 2 or more")
        return self

    @model_validator(mode="after")
    def _terms_are_consistent(self) -> "RewardSettings":
        if not self.terms:
            raise ValueError("`terms` is empty")
        for name in self.terms:
            if not name.isidentifier():
                raise ValueError(f"terms: {name!r} is not a valid name: letters, digits and _ were expected")
        if sum(isinstance(term, ModelTerm | ProcessTerm) for term in self.terms.values()) > 1:
            raise ValueError("terms: more than one is of kind `model` or `process`, and there is one reward model")
        if not self.normalise and any(term.normalise == "sft" for term in self.terms.values()):
            raise ValueError("terms: `normalise: sft` needs SFT responses, and reward.normalise is 0")
        if not self.has_model and self.attributes:
            raise unread_settings("terms: none is of kind `model`, so that `attributes` has no effect", "attributes")
        if not self.has_model and (self.model or self.classifier):
            raise unread_settings(
                "terms: none is of kind `model`, so that `model` and `classifier` have no effect", "model", "classifier"
            )
        return self

    @model_validator(mode="after")
    def _process_is_consistent(self) -> "RewardSettings":
        if self.process is None:
            return self
        if self.classifier:
            raise ValueError(
                "terms: one is of kind `process`, and `classifier` scores whole responses: set `model` to a reward "
                "model that was trained on labels of steps, or use a term of kind `model`"
            )
        for name in ("attributes", "ensemble", "ties", "ratings", "centering"):
            if getattr(self, name) != RewardSettings.model_fields[name].get_default(call_default_factory=True):
                raise unread_settings(
                    f"terms: one is of kind `process`, whose model learns labels of steps: `{name}` has no effect", name
                )
        return self

    @model_validator(mode="after")
    def _constraint_is_consistent(self) -> "RewardSettings":
        if not self.constraint:
            return self
        cost = self.constraint.term
        if cost not in self.terms:
            raise ValueError(f"constraint.term: unknown term {cost!r}; the terms are {', '.join(self.terms)}")
        if self.terms[cost].weight != 1.0:
            raise unread_settings(
                f"terms.{cost}.weight has no effect: the constraint's cost is weighted by λ", f"terms.{cost}.weight"
            )
        if self.terms[cost].normalise != "no":
            raise unread_settings(
                f"terms.{cost}.normalise: the bound is on the raw cost: remove the key", f"terms.{cost}.normalise"
            )
        if len(self.terms) == 1:
            raise ValueError("constraint: there is no term besides the cost")
        return self
