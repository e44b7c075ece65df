"""The settings of the reward stage."""

from pydantic import Field, model_validator

from policies.schema import Schedule, Settings


class FitSettings(Settings):
    """How a supervised stage (SFT or the reward model) is trained. Batch sizes are in samples (pairs in `reward`)."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch: int = Field(32, ge=1, description="samples an optimizer step")
    microbatch: int | None = Field(None, ge=1, description="samples a forward pass; unset: the whole batch")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    schedule: Schedule = Field("cosine", description="how the learning rate goes on from its peak, as in transformers")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises from zero")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    checkpoint_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    max_tokens: int = Field(
        512, ge=2, description="rows with more tokens are refused or skipped, as data.on_bad_row says"
    )

    @model_validator(mode="after")
    def _microbatch_divides(self) -> "FitSettings":
        if self.microbatch and self.batch % self.microbatch:
            raise ValueError(f"microbatch {self.microbatch} does not divide batch {self.batch}")
        return self


class RewardSettings(FitSettings):
    """The reward: a model trained here, one trained by an earlier run, or a ready classifier."""

    model: str | None = Field(None, description="a reward/ folder of an earlier run: used as it is, nothing is trained")
    classifier: str | None = Field(
        None, description="a ready sequence-classification model with its own tokenizer: used as it is"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the labels that are taken to be wrong")
    normalise: int = Field(
        256, ge=0, description="SFT responses by which the score is shifted and scaled to mean 0, deviation 1; 0: off"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "RewardSettings":
        if self.model and self.classifier:
            raise ValueError("give `model` or `classifier`, not both")
        return self
