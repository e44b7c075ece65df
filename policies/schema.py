"""The settings of the base model and of what is trained of it, and the class that every settings class derives from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Settings(BaseModel):
    """Immutable settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"]
"""The learning-rate schedules of transformers that need no parameters of their own."""


class ModelSettings(Settings):
    """The frozen base model that all roles share."""

    path: str = Field(description="folder or hub name of a causal language model with its tokenizer")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="precision of the frozen weights; adapters and heads are float32. auto: bfloat16 where the device "
        "multiplies in it",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )

    @field_validator("dtype")
    @classmethod
    def _settle(cls, dtype: str) -> str:
        """`auto` becomes what it means here, so that a run's `config.yaml` says what it ran in."""
        if dtype != "auto":
            return dtype
        from policies.loading import fast_dtype  # torch is slow to import, and only wanted here

        return fast_dtype()


class PolicySettings(Settings):
    """The adapter that every trained role has."""

    method: Literal["lora", "full"] = Field(
        "lora", description="lora: an adapter a role on one frozen base; full: all weights, a model a role"
    )
    rank: int = Field(16, ge=1, description="rank of the low-rank matrices")
    alpha: float = Field(32.0, gt=0, description="scale: the product of the matrices is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input, in SFT and reward training only")
    targets: str | list[str] = Field("all-linear", description="names of the layers to adapt, or all-linear")
