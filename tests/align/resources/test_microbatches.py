"""Microbatches that the settings leave open: the plan against what a model on a GPU, which is simulated, chooses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from align.config.schema import Experiment
from align.resources.memory import ModelSizes, estimate_memory, measure, with_microbatches
from align.resources.tensor_uses import bytes_by_gpu
from policies.microbatches import default_microbatch_tokens
from tests.random_models import SMALL_LLAMA as MODEL

STAGES = ["sft", "reward", "ppo"]
GPU_BYTES = 8e9


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """One with a model without weights, which leaves all microbatches open."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "tokenizer.json").touch()
    return Experiment.model_validate(
        {
            "name": "x",
            "model": {"path": str(tmp_path), "dtype": "float32"},
            "data": {"demonstrations": "a", "preferences": "b", "prompts": "c"},
            "learner": {"ranks": 2, "gpus": 1},
            "rollouts": {"workers": 2, "chunk_size": 256, "max_num_seqs": 256, "max_new_tokens": 768, "gpus": "shared"},
            "ppo": {"batch_size": 512},
        }
    )


@pytest.fixture
def sizes(experiment: Experiment) -> ModelSizes:
    return measure(experiment.model, experiment.policy)


def chosen(experiment: Experiment, stages: list[str], sizes: ModelSizes, gpu_bytes: float | None) -> list[int | None]:
    """The tokens of SFT, reward training and PPO."""
    filled = with_microbatches(experiment, stages, sizes, gpu_bytes)
    return [stage.tokens_per_microbatch for stage in (filled.sft, filled.reward, filled.learner)]


def chosen_on_gpu(sizes: ModelSizes, free: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """What the model would choose on a GPU with this many free bytes."""
    causal = sizes.trunk.causal
    model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=causal.dtype, config=causal.config)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, GPU_BYTES))
    return default_microbatch_tokens(model, sizes.trunk.width)


def test_on_a_gpu_they_are_what_ranks_choose_in_the_memory_that_they_leave(
    experiment: Experiment, sizes: ModelSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PPO, a worker shares the GPU of each rank."""
    held = bytes_by_gpu(experiment, [use for use in estimate_memory(experiment, STAGES, sizes) if not use.transient])
    expected = []
    for stage in STAGES:
        expected.append(chosen_on_gpu(sizes, GPU_BYTES - held[stage, "each of 2 ranks"], monkeypatch))
    assert chosen(experiment, STAGES, sizes, GPU_BYTES) == expected
    assert expected[0] > expected[2] > 2048  # the worker's KV cache takes memory, and some is left


@pytest.mark.parametrize("gpu_bytes", [None, 1e6])
def test_on_a_cpu_and_on_a_gpu_that_is_too_small_they_suit_a_cpu(
    gpu_bytes: float | None, experiment: Experiment, sizes: ModelSizes
) -> None:
    assert chosen(experiment, STAGES, sizes, gpu_bytes) == [2048] * 3


def test_those_that_are_set_and_those_of_other_stages_stay(experiment: Experiment, sizes: ModelSizes) -> None:
    sft = experiment.sft.model_copy(update={"tokens_per_microbatch": 300})
    changed = experiment.model_copy(update={"sft": sft})
    assert chosen(changed, ["sft", "reward"], sizes, None) == [300, 2048, None]
    assert changed.reward.tokens_per_microbatch is None
