"""The settings of the rollouts."""

from typing import Annotated

from pydantic import Field

from policies.schema import Settings


class RolloutSettings(Settings):
    """Who generates responses, and how they are sampled."""

    workers: int = Field(0, ge=0, description="Ray actors that generate; 0: in the controller's process")
    gpus: float = Field(0.0, ge=0, description="GPUs that each worker reserves of the Ray cluster")
    rows: int = Field(32, ge=1, description="prompts in flight in one engine, and handed to a worker at a time")
    merge: bool = Field(
        True,
        description="generate with the adapter merged into a copy of the weights: faster, for their memory",
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end a response, besides EOS; they stay in its text"
    )
    temperature: float = Field(1.0, gt=0, description="of the sampled distribution; log-probabilities are of the same")
    max_prompt_tokens: int = Field(256, ge=1, description="longer prompts are bad rows")
    max_new_tokens: int = Field(64, ge=1, description="a response that reaches this is cut")
    timeout: float = Field(600.0, gt=0, description="seconds after which a worker that has not answered is given up")
