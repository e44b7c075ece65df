"""vLLM's memory where several processes share a GPU; no GPU is needed to compute it."""

import pytest

from align.stages.ppo_parts import vllm_within_share
from rollouts.schema import RolloutSettings


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0.0, {}), (1.0, {}), (2.0, {}), (0.5, {"gpu_memory_utilization": 0.45})]
)
def test_a_share_of_a_gpu_limits_the_memory_of_vllm(gpus: float, expected: dict[str, float]) -> None:
    settings = RolloutSettings(workers=1, engine="vllm", vllm={"seed": 1})
    assert vllm_within_share(settings, gpus).vllm == {"seed": 1} | expected


def test_what_the_user_has_set_is_kept() -> None:
    settings = RolloutSettings(workers=1, engine="vllm", vllm={"gpu_memory_utilization": 0.3})
    assert vllm_within_share(settings, 0.5) == settings
