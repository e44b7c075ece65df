"""The settings of the base model and of what is trained of it, and the class that every settings class derives from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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
        description="precision of the frozen weights and of their products; adapters and heads are float32. auto: "
        "bfloat16 where the device multiplies in it",
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
        from policies.device import fast_dtype  # torch is slow to import, and only wanted here

        return fast_dtype()


Method = Literal[
    "lora",
    "qlora",
    "ia3",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
    "bottleneck",
    "bitfit",
    "layer_norm",
    "top_layers",
    "feature",
    "full",
]
SELECTED: frozenset[Method] = frozenset({"bitfit", "layer_norm", "top_layers", "feature"})
"""Methods that train some of the base's own parameters."""
SOFT: frozenset[Method] = frozenset({"prompt_tuning", "p_tuning", "prefix_tuning"})
"""Methods that train virtual tokens before the prompt."""

_LORA = {"rank", "alpha", "dropout", "targets", "rslora", "dora", "init", "lora_plus"}
READS: dict[str, set[str]] = {
    "lora": _LORA,
    "qlora": _LORA | {"quant_type", "double_quantization"},
    "ia3": {"targets"},
    "prompt_tuning": {"virtual_tokens", "init_text"},
    "p_tuning": {"virtual_tokens", "encoder", "encoder_width"},
    "prefix_tuning": {"virtual_tokens", "init_text"},
    "bottleneck": {"targets", "bottleneck", "activation"},
    "top_layers": {"layers"},
}
"""The settings that each method reads besides `method`."""


class PolicySettings(Settings):
    """What every trained role has of its own."""

    method: Method = Field("lora", description="what is trained; docs/methods.md compares them")
    rank: int = Field(16, ge=1, description="LoRA: rank of the low-rank matrices")
    alpha: float = Field(32.0, gt=0, description="LoRA: the product of the matrices is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA: on the adapter's input, in SFT and reward training only")
    targets: str | list[str] | None = Field(
        None,
        description="LoRA, (IA)³, bottleneck: names of the layers to adapt; unset: all linear layers, keys and values "
        "and feed-forward, ends of the sublayers",
    )
    rslora: bool = Field(False, description="LoRA: scale by alpha / √rank instead")
    dora: bool = Field(False, description="LoRA: train magnitudes of the weights' columns too")
    init: Literal["zero", "pissa", "loftq"] = Field(
        "zero",
        description="LoRA: start as a change of nothing, from the principal directions of the weights, or (qlora) from "
        "what quantisation has lost",
    )
    lora_plus: float | None = Field(
        None, ge=1, description="LoRA: learning rate of B over that of A; unset: the same for both"
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="qlora: type of the frozen linear weights")
    double_quantization: bool = Field(True, description="qlora: quantise the scales too")
    virtual_tokens: int = Field(20, ge=1, description="soft prompts: how many virtual tokens come first")
    init_text: str | None = Field(
        None, description="prompt and prefix tuning: text whose tokens they start as; unset: tokens at random"
    )
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="p-tuning: what makes the virtual tokens in training")
    encoder_width: int = Field(128, ge=1, description="p-tuning: hidden units of the encoder")
    bottleneck: int = Field(64, ge=1, description="bottleneck: units between down and up")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("gelu", description="bottleneck: between down and up")
    layers: int = Field(1, ge=1, description="top_layers: how many of the last decoder layers")

    @property
    def full_rank(self) -> int:
        """Rank of the matrices as they are saved: PiSSA's hold, beside what is trained, what they started from."""
        return self.rank * (2 if self.init == "pissa" else 1)

    @property
    def full_alpha(self) -> float:
        """Alpha as it is saved: the scale stays that of `rank` and `alpha`."""
        return self.alpha * self.full_rank / self.rank

    @property
    def target_names(self) -> list[str]:
        """The names in `targets`."""
        return [self.targets] if isinstance(self.targets, str) else list(self.targets or ())

    @model_validator(mode="after")
    def _consistent(self) -> "PolicySettings":
        fields = type(self).model_fields
        read = READS.get(self.method, set()) | {"method"}
        for name in sorted(fields.keys() - read):
            if getattr(self, name) != fields[name].default:
                methods = " or ".join(method for method, names in READS.items() if name in names)
                raise ValueError(f"method {self.method} does not read {name}, which is for {methods}: remove it")
        if self.init == "pissa" and self.rslora:
            raise ValueError("init pissa sets the scale of its matrices by alpha / rank: remove rslora")
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init loftq makes good what quantisation loses: use it with method qlora")
        if self.init == "pissa" and self.method == "qlora":
            raise ValueError("init pissa needs the weights themselves, which method qlora has quantised: use loftq")
        if self.init != "zero" and self.dora:
            raise ValueError(f"init {self.init} and dora do not go together: remove one of them")
        return self
