"""The settings of rollouts."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from policies.schema import BOOLEAN_WORDS, ActorSettings, Strategy, unread_settings

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for its setting `max_lora_rank`."""
LARGEST_VLLM_RANK = VLLM_RANKS[-1]


class RolloutSettings(ActorSettings):
    """What generates responses, and how they are sampled."""

    workers: int = Field(0, ge=0, description="Ray actors that generate; 0: in the controller's process")
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="inference engine; vllm runs in workers only"
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of vllm.LLM, such as gpu_memory_utilization"
    )
    gpus: float | Literal["shared"] | None = Field(
        None,
        description="GPUs of each worker: a whole number, or a share such as 0.5; shared: the GPUs of the learner's "
        "ranks; unset: those that the ranks leave, or else shared",
    )
    strategy: Strategy = Field(
        "SPREAD", description="as `learner.strategy`; workers that share the ranks' GPUs are where the ranks are"
    )
    max_num_seqs: int = Field(32, ge=1, description="sequences that an engine decodes at the same time")
    chunk_size: int | None = Field(
        None, ge=1, description="prompts that an engine is handed at a time; unset: twice `max_num_seqs`"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        description="steps by which the sampling weights may lag; above 0, rollouts run while the learner trains",
    )
    segment_tokens: int | None = Field(
        None,
        ge=1,
        description="partial rollouts, with max_staleness: new tokens after which an unfinished response continues "
        "with the newest weights; unset: each response is generated with one version",
    )
    merge: bool = Field(
        True,
        description="engine transformers: generate with the adapter merged into a copy of the weights, which is faster",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end a response, besides EOS; they are kept in its text"
    )
    environment: str | None = Field(
        None,
        description="function that replies where a response ends, FILE.py:function or module:function: its reply, such "
        "as the output of a tool, is appended, and the policy continues; unset: responses end there",
    )
    temperature: float = Field(
        1.0, gt=0, description="sampling temperature; log-probabilities are those at this temperature"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="a row with a longer prompt is invalid")
    max_new_tokens: int = Field(64, ge=1, description="longer responses are truncated")
    timeout: float = Field(600.0, gt=0, description="seconds after which a worker that has not replied is replaced")
    straggler_factor: float = Field(
        4.0,
        gt=1,
        description="multiple of a chunk's median seconds after which the same chunk is also given to another worker",
    )

    @property
    def effective_chunk_size(self) -> int:
        """The chunk size in effect."""
        return self.chunk_size or 2 * self.max_num_seqs

    @field_validator("gpus", mode="before")
    @classmethod
    def _whole_or_a_share(cls, gpus: Any) -> Any:
        is_number = isinstance(gpus, int | float)
        if (is_number and gpus < 0) or (isinstance(gpus, str) and gpus != "shared"):
            raise ValueError("expected a number ≥ 0, or shared")
        if is_number and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"a worker has a share of one GPU, or whole GPUs: {int(gpus)} or {int(gpus) + 1}")
        return gpus

    @field_validator("vllm")
    @classmethod
    def _booleans_are_true_or_false(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Refuse words that older YAML reads as booleans: vLLM would take any text for true."""
        for name, value in arguments.items():
            if isinstance(value, str) and any(value.lower() in words for words in BOOLEAN_WORDS.values()):
                raise ValueError(f"{name}: expected true or false instead of {value}")
        return arguments

    @model_validator(mode="after")
    def _check_engine_and_workers(self) -> "RolloutSettings":
        if self.max_staleness and not self.workers:
            raise ValueError(
                "max_staleness: rollouts run in parallel with the learner only in workers: set workers to 1 or more"
            )
        if self.segment_tokens and not self.max_staleness:
            raise ValueError(
                "segment_tokens: responses can take up newer weights only while the learner trains: set max_staleness"
            )
        if self.segment_tokens and self.stop and self.engine == "vllm":
            raise unread_settings(
                "segment_tokens: vllm would miss a stop string that begins before a segment ends: remove one of the "
                "two",
                "segment_tokens",
                "stop",
            )
        if self.environment and self.max_staleness:
            raise ValueError(
                "environment: it replies while the learner waits, and max_staleness generates meanwhile: remove one"
            )
        if self.engine == "vllm" and not self.workers:
            raise ValueError("engine vllm runs only in workers: set workers to 1 or more")
        if self.vllm and self.engine != "vllm":
            raise unread_settings(
                f"`vllm` has no effect with engine {self.engine}: remove it, or set engine to vllm", "vllm"
            )
        return self
