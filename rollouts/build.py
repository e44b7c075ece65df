"""The engine that the settings choose."""

from policies.schema import ModelSettings, PolicySettings
from rollouts.engine import Engine
from rollouts.schema import RolloutSettings
from rollouts.transformers_engine import build_transformers_engine


def build_engine(model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings) -> Engine:
    """Build the engine of `rollouts.engine`, with its own model, in this process.

    Args:
        model: The base model.
        policy: The adaptation method and its settings.
        rollouts: The engine and its settings.
    """
    if rollouts.engine == "vllm":
        from rollouts.vllm_engine import VllmEngine  # not installed everywhere

        return VllmEngine(model, policy, rollouts)
    return build_transformers_engine(model, policy, rollouts)
