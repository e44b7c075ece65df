"""The settings of the rollouts."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from policies.schema import Settings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The largest ranks of an adapter that vLLM can be told to make room for."""
LARGEST_RANK = RANKS[-1]


class RolloutSettings(Settings):
    """Who generates responses, and how they are sampled."""

    workers: int = Field(0, ge=0, description="Ray actors that generate; 0: in the controller's process")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what generates; vllm in workers only")
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of vllm.LLM, as gpu_memory_utilization"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs that each worker reserves of the Ray cluster")
    max_num_seqs: int = Field(32, ge=1, description="prompts in flight in one engine")
    chunk_size: int | None = Field(
        None, ge=1, description="prompts that an engine is handed at a time; unset: twice `max_num_seqs`"
    )
    max_staleness: int = Field(
        0, ge=0, description="steps that the sampling weights may be old: rollouts then go on while the learner trains"
    )
    segment_tokens: int | None = Field(
        None,
        ge=1,
        description="with max_staleness: new tokens after which a response under way takes up the newest weights; unset: a "
        "response is made under one version",
    )
    merge: bool = Field(
        True,
        description="engine transformers: generate with the adapter merged into a copy of the weights, for speed",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end a response, besides EOS; they stay in its text"
    )
    temperature: float = Field(1.0, gt=0, description="of the sampled distribution; log-probabilities are of the same")
    max_prompt_tokens: int = Field(256, ge=1, description="longer prompts are bad rows")
    max_new_tokens: int = Field(64, ge=1, description="a response that reaches this is truncated")
    timeout: float = Field(600.0, gt=0, description="seconds after which a worker that has not answered is given up")
    straggler_factor: float = Field(
        4.0, gt=1, description="times the median chunk's seconds after which another worker is handed the same chunk"
    )

    @property
    def effective_chunk_size(self) -> int:
        """The chunk in force."""
        return self.chunk_size or 2 * self.max_num_seqs

    @model_validator(mode="after")
    def _has_workers(self) -> "RolloutSettings":
        if self.max_staleness and not self.workers:
            raise ValueError(
                "max_staleness lets rollouts go on beside the learner, in workers: set workers to 1 or more"
            )
        if self.segment_tokens and not self.max_staleness:
            raise ValueError(
                "segment_tokens lets responses go on under weights that come while they are made: set max_staleness"
            )
        if self.segment_tokens and self.stop and self.engine == "vllm":
            raise ValueError(
                "segment_tokens: vllm would miss a stop string that begins before a segment ends: remove one"
            )
        if self.engine == "vllm" and not self.workers:
            raise ValueError("engine vllm runs in workers, beside the learner's process: set workers to 1 or more")
        if self.vllm and self.engine != "vllm":
            raise ValueError(f"`vllm` is of engine vllm, and engine is {self.engine}: remove it")
        return self
