"""The engine that the settings choose."""

from policies.schema import ModelSettings, PolicySettings
from rollouts.engine import Engine
from rollouts.schema import RolloutSettings
from rollouts.transformers_engine import build_transformers_engine


def build_engine(model: ModelSettings, policy: PolicySettings, rollouts: RolloutSettings) -> Engine:
    """Build an engine with its own model, in this process."""
    if rollouts.engine == "vllm":
        from rollouts.vllm_engine import VllmEngine  # not installed everywhere

        return VllmEngine(model, policy, rollouts)
    return build_transformers_engine(model, policy, rollouts)
