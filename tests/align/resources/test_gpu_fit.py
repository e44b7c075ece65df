"""Processes beside the memory of their GPUs, computed without one."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.schema import Experiment
from align.resources.gpu_fit import USABLE, GpuFit, compare_with_gpu
from align.resources.memory import estimate_memory, measure
from align.resources.tensor_uses import TensorUse, bytes_by_gpu
from tests.random_models import SMALL_LLAMA as MODEL


@pytest.fixture
def base(tmp_path: Path) -> str:
    """The folder of a model without weights."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "tokenizer.json").touch()
    return str(tmp_path)


def make(base: str, **sections: dict[str, Any]) -> Experiment:
    settings: dict[str, Any] = {
        "name": "x",
        "model": {"path": base, "dtype": "float32"},
        "data": {"demonstrations": "a", "preferences": "b", "prompts": "c"},
        "sft": {"tokens_per_microbatch": 4096, "max_tokens": 512},
        "rollouts": {"max_prompt_tokens": 256, "max_new_tokens": 256},
        "learner": {"tokens_per_microbatch": 4096},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    return Experiment.model_validate(settings)


def uses_of(experiment: Experiment, *stages: str, gpu_bytes: float | None = None) -> list[TensorUse]:
    return estimate_memory(experiment, list(stages), measure(experiment.model, experiment.policy), gpu_bytes)


def compared(experiment: Experiment, gpu_bytes: float, stage: str = "sft", process: str = "learner") -> GpuFit:
    fits = compare_with_gpu(experiment, uses_of(experiment, stage, gpu_bytes=gpu_bytes), gpu_bytes)
    return next(fit for fit in fits if (fit.stage, fit.process) == (stage, process))


def largest(experiment: Experiment, stage: str = "sft", process: str = "learner") -> float:
    """The bytes of a process."""
    return bytes_by_gpu(experiment, uses_of(experiment, stage))[stage, process]


def tokens_of(experiment: Experiment, stage: str, gpu_bytes: float) -> int:
    """The tokens of a microbatch."""
    uses = uses_of(experiment, stage, gpu_bytes=gpu_bytes)
    (role,) = [use.role for use in uses if use.role.startswith("activations, ")]
    return int(role.split()[1].replace(",", ""))


def test_what_takes_nine_tenths_of_a_gpu_fits_and_one_byte_more_does_not(base: str) -> None:
    experiment = make(base)
    size = largest(experiment)
    fits = compared(experiment, size / USABLE)
    assert (fits.fits, fits.settings, fits.bytes, fits.bytes_then) == (True, (), size, size)
    assert not compared(experiment, (size - 1) / USABLE).fits


def test_gradient_checkpointing_is_the_first_advice_and_the_only_one_where_it_does(base: str) -> None:
    experiment = make(base)
    with_it = make(base, model={"gradient_checkpointing": True})
    fit = compared(experiment, largest(with_it) / USABLE)
    assert fit.settings == ("model.gradient_checkpointing=true",)
    assert fit.bytes_then == largest(with_it)


def test_a_smaller_microbatch_is_as_large_as_it_may_be(base: str) -> None:
    smaller = make(base, model={"gradient_checkpointing": True}, sft={"tokens_per_microbatch": 1024})
    fit = compared(make(base), largest(smaller) / USABLE)
    assert fit.settings == ("model.gradient_checkpointing=true", "sft.tokens_per_microbatch=1024")
    assert fit.bytes_then == largest(smaller)


def test_advice_that_the_method_does_not_allow_is_not_given(base: str) -> None:
    prefixes = make(base, policy={"method": "prefix_tuning"})
    smaller = make(base, policy={"method": "prefix_tuning"}, sft={"tokens_per_microbatch": 2048})
    assert compared(prefixes, largest(smaller) / USABLE).settings == ("sft.tokens_per_microbatch=2048",)


def test_four_bits_come_last(base: str) -> None:
    settings = {"gradient_checkpointing": True}
    small = make(base, model=settings, sft={"tokens_per_microbatch": 512})
    quantised = make(base, model=settings, sft={"tokens_per_microbatch": 512}, policy={"method": "qlora"})
    assert "policy.method=qlora" in compared(make(base), largest(quantised) / USABLE).settings
    assert "policy.method=qlora" not in compared(make(base), largest(small) / USABLE).settings


def test_where_no_setting_helps_none_is_named(base: str) -> None:
    fit = compared(make(base), 1e6)
    assert (fit.fits, fit.settings) == (False, ())


def test_workers_decode_fewer_sequences_at_a_time(base: str) -> None:
    sections: dict[str, dict[str, Any]] = {"learner": {"ranks": 1}, "ppo": {"batch_size": 128}}
    workers = {"workers": 1, "chunk_size": 64, "max_num_seqs": 64}
    experiment = make(base, rollouts=workers, **sections)
    fewer = make(base, rollouts=workers | {"max_num_seqs": 16}, **sections)
    fit = compared(experiment, largest(fewer, "ppo", "worker") / USABLE, "ppo", "worker")
    assert fit.settings == ("rollouts.max_num_seqs=16",)


def test_ranks_shard_more_before_the_base_is_quantised(base: str) -> None:
    process = "each of 2 ranks"
    policy = {"method": "full"}
    ranks = {"ranks": 2, "zero": 0}
    small = {"tokens_per_microbatch": 512, "zero": 2}
    sharded = make(base, policy=policy, sft=ranks | small, model={"gradient_checkpointing": True})
    fit = compared(make(base, policy=policy, sft=ranks), largest(sharded, "sft", process) / USABLE, "sft", process)
    assert "sft.zero=2" in fit.settings


def test_an_unset_microbatch_is_halved_from_what_a_rank_chooses(base: str) -> None:
    """The layers are so wide that activations take more than the choice supposes."""
    Path(base, "config.json").write_text(json.dumps(MODEL | {"intermediate_size": 16384}))
    unset = make(base, policy={"method": "prefix_tuning"}, sft={"tokens_per_microbatch": None})
    assert tokens_of(unset, "sft", 4.6e9) == 8192
    halved = make(base, policy={"method": "prefix_tuning"}, sft={"tokens_per_microbatch": 4096})
    fit = compared(unset, 4.6e9)  # with room for what layers save in addition where there are no kernels
    assert (fit.settings, fit.bytes_then) == (("sft.tokens_per_microbatch=4096",), largest(halved))


def test_advice_that_frees_memory_counts_the_larger_microbatch_that_follows(base: str) -> None:
    """The KV cache takes more than the GPU has, and half of it leaves room for more than the tokens of a CPU."""
    rollouts = {"max_num_seqs": 8192, "chunk_size": 8192}
    sections: dict[str, dict[str, Any]] = {"learner": {"tokens_per_microbatch": None}, "ppo": {"batch_size": 8192}}
    unset = make(base, rollouts=rollouts, **sections)
    assert tokens_of(unset, "ppo", 20e9) == 2048
    fit = compared(unset, 20e9, "ppo")
    assert fit.settings == ("rollouts.max_num_seqs=4096",)
    followed = make(base, rollouts=rollouts | {"max_num_seqs": 4096}, **sections)
    assert tokens_of(followed, "ppo", 20e9) == 4096
    assert compared(followed, 20e9, "ppo").bytes == fit.bytes_then


def test_workers_on_the_ranks_gpus_are_added_to_the_ranks(base: str) -> None:
    sections: dict[str, dict[str, Any]] = {"learner": {"ranks": 2, "gpus": 1}, "ppo": {"batch_size": 128}}
    apart = make(base, rollouts={"workers": 3, "chunk_size": 8}, **sections)
    together = make(base, rollouts={"workers": 3, "chunk_size": 8, "gpus": "shared"}, **sections)
    sums = bytes_by_gpu(apart, uses_of(apart, "ppo"))
    rank = sums["ppo", "each of 2 ranks"]
    worker = sums["ppo", "each of 3 workers"]
    assert bytes_by_gpu(together, uses_of(together, "ppo")) == {("ppo", "each of 2 ranks"): rank + 2 * worker}
