"""Settings of the base model and of the adaptation method, and the base class of all settings."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from policies.method_spec import MethodSpec, methods


class Settings(BaseModel):
    """Immutable settings that refuse unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _booleans_elsewhere(cls, values: Any) -> Any:
        """Turn `true` and `false` into text where a number or a word is expected.

        Pydantic would read them as numbers, 1 and 0. It refuses the text, with the key of the setting, which an error
        that is raised here would lack. A word such as `no` arrives as `false` from readers of YAML 1.1.
        """
        if not isinstance(values, dict):
            return values
        checked = dict(values)
        for name, value in values.items():
            if not isinstance(value, bool) or name not in cls.model_fields:
                continue
            annotation = cls.model_fields[name].annotation
            if _is_number(annotation):
                checked[name] = str(value).lower()
            elif words := [word for word in get_args(annotation) if word in BOOLEAN_WORDS[value]]:
                checked[name] = words[0]
        return checked


BOOLEAN_WORDS = {False: ("no", "off"), True: ("yes", "on")}
"""The words that YAML 1.1 reads as booleans, besides false and true."""
UNREAD = "unread_settings"
"""The type of pydantic's error where settings have no effect."""


def unread_settings(message: str, *names: str) -> PydanticCustomError:
    """The error of a validator about settings that others leave without effect.

    Args:
        message: What is wrong.
        names: The settings to remove, as dotted paths within the section that is validated.
    """
    return PydanticCustomError(UNREAD, "{message}", {"message": message, "names": names})


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _is_number(annotation: Any) -> bool:
    """Whether a setting is a number, one of several numbers, or optionally so."""
    if get_origin(annotation) is Literal:
        return all(type(value) is int for value in get_args(annotation))
    members = get_args(annotation) or (annotation,)
    return bool({int, float} & set(members)) and bool not in members


SpecialTokens = Literal["refuse", "control", "text"]
"""What the text of a special token means inside a text; see `policies.text.encoder.TextEncoder`."""

Schedule = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"]
"""Learning-rate schedules of transformers that need no further parameters."""


class TokenizerSettings(Settings):
    """The tokenizer of a base model that is made from nothing: byte-level BPE, trained on the demonstrations."""

    vocab_size: int = Field(
        4096, ge=300, description="tokens, 256 of which are single bytes; fewer where the texts are short"
    )
    special_tokens: list[str] = Field(
        default_factory=list, description="tokens besides <pad>, <s> and </s>, such as those that chat_template writes"
    )


class ModelSettings(Settings):
    """The frozen base model that all roles share."""

    path: str = Field(
        description="folder or hub name of a causal language model with its tokenizer; with `architecture`, the folder "
        "to make it in"
    )
    architecture: dict[str, Any] | None = Field(
        None,
        description="make the base from nothing: `model_type` and keys of its configuration in transformers, such as "
        "hidden_size; unset: it exists",
    )
    tokenizer: TokenizerSettings | None = Field(
        None, description="the tokenizer that is trained with `architecture`; unset: its defaults"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="precision of the frozen weights and of products with them; adapters and heads are float32. auto: "
        "bfloat16 if the devices that compute multiply in it natively (GPUs since Ampere, CPUs with AMX) and the "
        "method does not train the weights themselves, else float32",
    )
    chat_template: str | None = Field(
        None,
        description="chat template in place of the tokenizer's own, for base models without one: a file in Jinja, or "
        "chatml, llama3 or plain; unset: the tokenizer's own",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )

    @model_validator(mode="after")
    def _makes_a_base(self) -> "ModelSettings":
        if self.tokenizer is not None and self.architecture is None:
            raise unread_settings("`tokenizer` has no effect without `architecture`", "tokenizer")
        if self.architecture is not None and not isinstance(self.architecture.get("model_type"), str):
            raise ValueError("architecture: `model_type` is missing, such as llama")
        return self

    @field_validator("dtype", mode="before")
    @classmethod
    def _refuse_float16(cls, dtype: Any) -> Any:
        if dtype == "float16":
            raise ValueError(
                "in float16, gradients below 6e-8 vanish and states above 65,504 overflow: use bfloat16, or float32 "
                "where the device has no bfloat16 (`align export --merge --dtype float16` writes float16)"
            )
        return dtype

    def dtype_for(self, policy: "PolicySettings | None") -> str:
        """The dtype that this process computes in: `auto` stands for the dtype that suits its device and the method.

        Args:
            policy: The adaptation method; None: no weights of the model are trained.
        """
        if self.dtype != "auto":
            return self.dtype
        if policy is not None and not policy.spec.below_float32:
            return "float32"
        from policies.device import fast_dtype  # torch is slow to import, and needed here only

        return fast_dtype()


class PolicySettings(Settings):
    """The adaptation method: what is trained, for each role separately."""

    method: str = Field("lora", description="what is trained; docs/methods.md compares them")
    rank: int = Field(16, ge=1, description="LoRA, LoHa, LoKr, VeRA: rank of the low-rank matrices")
    alpha: float = Field(
        32.0, gt=0, description="LoRA, LoHa, LoKr: the product of the matrices is multiplied by alpha / rank"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="LoRA, VeRA: on the adapter's input, in SFT and reward training only"
    )
    targets: str | list[str] | None = Field(
        None,
        description="names of the layers to adapt, not LM head or embeddings; unset: all linear layers; for (IA)³ key "
        "and value projections and the MLP's last layer; for bottleneck, Compacter and AdaMix the last "
        "layers of attention and MLP",
    )
    rslora: bool = Field(False, description="LoRA: scale by alpha / √rank instead")
    dora: bool = Field(False, description="LoRA: train magnitudes of the weights' columns too")
    init: Literal["zero", "pissa", "loftq"] = Field(
        "zero",
        description="LoRA: start as a change of zero, from the principal directions of the weights, or (qlora) from "
        "the quantisation error",
    )
    lora_plus: float | None = Field(
        None, ge=1, description="LoRA: learning rate of B over that of A; unset: the same for both"
    )
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="qlora: type of the frozen linear weights")
    double_quantization: bool = Field(True, description="qlora: quantise the scales too")
    virtual_tokens: int = Field(20, ge=1, description="soft prompts: number of virtual tokens before the prompt")
    init_text: str | None = Field(
        None,
        description="prompt, prefix and intrinsic prompt tuning: text whose tokens they start as; unset: random tokens",
    )
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="p-tuning: what makes the virtual tokens in SFT")
    encoder_width: int = Field(128, ge=1, description="p-tuning: hidden units of the encoder")
    bottleneck: int = Field(64, ge=1, description="bottleneck, Compacter, AdaMix: hidden units of the adapter")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field(
        "gelu", description="bottleneck, Compacter, AdaMix: non-linearity of the adapter"
    )
    experts: int = Field(4, ge=2, description="AdaMix: bottleneck adapters per layer in SFT, which are then averaged")
    kronecker_terms: int = Field(
        4, ge=1, description="Compacter: number of Kronecker products, and rows and columns of their shared factors"
    )
    kronecker_rank: int = Field(1, ge=1, description="Compacter: rank of the factors that are not shared")
    layers: int = Field(1, ge=1, description="top_layers: number of decoder layers, counted from the last")
    initial_rank: int | None = Field(
        None, ge=1, description="AdaLoRA: rank of every layer at first; unset: half as much again as `rank`"
    )
    allocation_start: float = Field(
        0.1, ge=0, lt=1, description="AdaLoRA: share of SFT's steps after which ranks are cut, to `rank` on average"
    )
    allocation_end: float = Field(
        0.5, gt=0, le=1, description="AdaLoRA: share of SFT's steps after which the ranks stay as they are"
    )
    orthogonality: float = Field(
        0.5, ge=0, description="AdaLoRA: weight of the penalty on singular vectors that are not orthogonal"
    )
    projection_seed: int = Field(
        0, ge=0, description="VeRA, intrinsic prompt: seed of the frozen random directions, which are not saved"
    )
    intrinsic_dimension: int = Field(
        64, ge=1, description="intrinsic prompt: dimensions of the subspace in which the prompt is trained"
    )
    subspace: str | None = Field(
        None,
        description="intrinsic prompt: prompt table whose tasks span the subspace by their principal components "
        "(`align export RUN --to FILE --task NAME` adds one); unset: random directions",
    )
    kronecker_factor: int = Field(
        -1,
        ge=-1,
        description="LoKr: most rows and columns of the first factor of a Kronecker product; -1: as near to those of "
        "the second as divisors of the layer's sizes allow",
    )
    block_size: int = Field(32, ge=2, description="OFT: inputs that are rotated together")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in methods():
            raise ValueError(f"expected one of {', '.join(methods())}")
        return method

    @field_validator("kronecker_factor")
    @classmethod
    def _is_a_size(cls, factor: int) -> int:
        if factor == 0:
            raise ValueError("0 rows are no matrix: set at least 1, or -1")
        return factor

    @property
    def spec(self) -> MethodSpec:
        """The description of the method."""
        return methods()[self.method]

    def is_default(self, name: str) -> bool:
        """Whether a setting has its default value."""
        return bool(getattr(self, name) == type(self).model_fields[name].default)

    @property
    def full_rank(self) -> int:
        """Rank of the matrices that are saved: PiSSA's hold both what is trained and what it started from."""
        return self.rank * (2 if self.init == "pissa" else 1)

    @property
    def full_initial_rank(self) -> int:
        """`initial_rank`, where it is unset 1.5 times the rank, as in the experiments of AdaLoRA's paper."""
        return self.initial_rank or math.ceil(1.5 * self.rank)

    @property
    def full_alpha(self) -> float:
        """Alpha that is saved with `full_rank`: the scale stays that of `rank` and `alpha`."""
        return self.alpha * self.full_rank / self.rank

    @property
    def target_names(self) -> list[str]:
        """The names in `targets`."""
        return [self.targets] if isinstance(self.targets, str) else list(self.targets or ())

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> "PolicySettings":
        readable = type(self).model_fields.keys() - {"method", *self.spec.reads}
        unread = [name for name in sorted(readable) if not self.is_default(name)]
        if not unread:
            return self
        readers = [spec.name for spec in methods().values() if set(unread) & set(spec.reads)]
        are = "is" if len(unread) == 1 else "are"
        raise unread_settings(
            f"method {self.method} does not read {listed(unread)}, which {are} for {' or '.join(readers)}: "
            f"remove {'it' if len(unread) == 1 else 'them'}",
            *unread,
        )

    @model_validator(mode="after")
    def _ranks_are_cut(self) -> "PolicySettings":
        if self.full_initial_rank < self.rank:
            raise ValueError(f"initial_rank {self.initial_rank} is below rank {self.rank}, to which ranks are cut")
        if self.allocation_start >= self.allocation_end:
            raise ValueError(
                f"allocation_start {self.allocation_start} is not before allocation_end {self.allocation_end}"
            )
        return self

    @model_validator(mode="after")
    def _init_fits(self) -> "PolicySettings":
        quantising = [spec.name for spec in methods().values() if spec.four_bits]
        if self.init == "pissa" and self.rslora:
            raise unread_settings("init pissa scales its matrices by alpha / rank: remove rslora", "rslora")
        if self.init == "loftq" and not self.spec.four_bits:
            raise ValueError(f"init loftq makes up for quantisation: use it with method {' or '.join(quantising)}")
        if self.init == "pissa" and self.spec.four_bits:
            raise ValueError(f"init pissa needs the weights that method {self.method} quantises: use loftq")
        if self.init != "zero" and self.dora:
            raise unread_settings(f"init {self.init} and dora do not go together: remove one of them", "init", "dora")
        return self


class OptimizerSettings(Settings):
    """The optimizer of a stage, and the microbatches over which its gradient is accumulated."""

    optimizer: Literal["adamw", "paged_adamw", "sgd"] = Field(
        "adamw", description="paged_adamw: of bitsandbytes; its state moves to host memory when the GPU is full"
    )
    schedule: Schedule = Field("constant", description="decay of the learning rate after warmup, as in transformers")
    warmup: float = Field(
        0.0, ge=0, lt=1, description="share of the steps over which the learning rate rises from zero"
    )
    weight_decay: float = Field(0.0, ge=0, description="weight decay, of all but biases and normalisation layers")
    adam_epsilon: float = Field(1e-8, gt=0, description="ε of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="largest norm of the gradient")
    max_skipped: int = Field(
        10,
        ge=1,
        description="the run stops after this many consecutive steps skipped for a gradient that is not finite",
    )
    tokens_per_microbatch: int | None = Field(
        None,
        ge=1,
        description="tokens of one microbatch, any padding included; unset: chosen for the device, then kept by the "
        "run; halved where memory runs out",
    )


Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
"""How Ray distributes actors over nodes."""


class ActorSettings(Settings):
    """What each Ray actor of a kind reserves, and where it may run."""

    cpus: int | None = Field(
        None, ge=1, description="CPUs that each actor reserves, and its CPU threads; unset: 1, and a share of its node"
    )
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="NAME: how much of a custom resource of Ray each actor reserves"
    )
    label_selector: dict[str, str] = Field(
        default_factory=dict, description="NAME: value that this label of an actor's node must have, as in Ray"
    )
    strategy: Strategy = Field(
        "PACK", description="PACK: on as few nodes as possible; SPREAD: on many; STRICT_…: on one, or each on its own"
    )
