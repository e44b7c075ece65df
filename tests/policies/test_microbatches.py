from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policies.microbatches import default_microbatch_tokens, microbatch_tokens, packed_multiple

TEXT = SimpleNamespace(num_hidden_layers=2, vocab_size=100)
CONFIG: Any = SimpleNamespace(get_text_config=lambda: TEXT)
"""What the functions ask of the configuration of a model, which may be more than one of text."""


def model_on(device: str, dtype: torch.dtype) -> Any:
    """What the functions ask of a model."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, config=CONFIG)


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.float32, 2048), (torch.bfloat16, 4096)])
def test_on_a_cpu_a_microbatch_fits_the_caches(dtype: torch.dtype, tokens: int) -> None:
    assert default_microbatch_tokens(model_on("cpu", dtype), width=32) == tokens


@pytest.mark.parametrize(("tokens_in_memory", "tokens"), [(9000, 8192), (8192, 8192), (8191, 4096), (10, 4096)])
def test_on_a_gpu_a_microbatch_takes_a_third_of_the_free_memory(
    tokens_in_memory: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In powers of two, and no fewer tokens than on a CPU."""
    bytes_per_token = 2 * (34 * 2 * 32 + 3 * 100)
    free = 3 * tokens_in_memory * bytes_per_token
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    assert default_microbatch_tokens(model_on("cuda", torch.bfloat16), width=32) == tokens


@pytest.mark.parametrize("free", [None, 0.0, -1e9, 1.0])
def test_a_gpu_without_free_memory_gets_a_microbatch_as_a_cpu_does(free: float | None) -> None:
    assert microbatch_tokens(CONFIG, width=32, bytes_per_number=4, free_bytes=free) == 2048


@pytest.mark.parametrize(
    ("device", "dtype", "multiple"),
    [("cpu", torch.bfloat16, 32), ("cpu", torch.float32, 1), ("cuda", torch.bfloat16, 1)],
)
def test_packed_tokens_are_a_multiple_in_bfloat16_on_a_cpu(device: str, dtype: torch.dtype, multiple: int) -> None:
    assert packed_multiple(model_on(device, dtype)) == multiple
