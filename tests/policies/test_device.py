import os
from collections.abc import Iterator

import pytest
import torch

from policies.device import ComputeSettings, cores, default_device, describe_device, free_memory, leave_gpu
from policies.errors import UserError


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    ComputeSettings(threads, deterministic).apply()
    torch.backends.cuda.matmul.allow_tf32 = tf32


def put() -> torch.Tensor:
    """What torch has no deterministic way to do: the last of two writers to one place wins."""
    return torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_what_may_differ_from_run_to_run_is_refused() -> None:
    ComputeSettings(1, deterministic=True).apply()
    with pytest.raises(RuntimeError, match="deterministic"):
        put()
    ComputeSettings(1, deterministic=False).apply()
    assert float(put()[0]) in (1.0, 2.0)


def test_threads_are_set() -> None:
    for threads in (2, 1):
        ComputeSettings(threads).apply()
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("on_gpu", "setting", "deterministic", "tf32"),
    [
        (False, None, True, False),
        (False, True, True, False),
        (False, False, False, False),
        (True, None, False, True),
        (True, True, True, False),
        (True, False, False, True),
    ],
)
def test_each_process_is_deterministic_or_multiplies_in_tf32_by_its_own_device(
    on_gpu: bool, setting: bool | None, deterministic: bool, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)  # a GPU is simulated
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    ComputeSettings(1, setting).apply()
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert torch.backends.mkldnn.matmul.fp32_precision == on_cpu  # type: ignore[attr-defined]


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_device_is_described_by_its_name_and_the_dtype_that_it_is_fast_in(
    native: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: native)
    assert (describe_device().name, describe_device().fast_dtype) == ("CPU", dtype)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert (describe_device().name, describe_device().fast_dtype) == ("NVIDIA X", dtype)


def test_an_actor_without_a_gpu_hides_those_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    ComputeSettings(1).apply()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    ComputeSettings(1, gpu=False).apply()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_an_actor_with_a_gpu_that_torch_does_not_find_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES is '3'\), and torch .* finds none"):
        ComputeSettings(1, gpu=True).apply()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU is simulated
    ComputeSettings(1, gpu=True).apply()


def test_processes_share_the_cores() -> None:
    for processes in (1, 2, 1000):
        ComputeSettings(None, processes=processes).apply()
        assert torch.get_num_threads() == max(1, cores() // processes)


def test_a_process_can_leave_the_gpu_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU is simulated
    with leave_gpu():
        assert default_device().type == "cpu"
    assert default_device().type == "cuda"


def test_freed_memory_is_free_for_other_processes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    free_memory()
    assert not emptied  # it would initialise CUDA
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # a GPU is simulated
    free_memory()
    assert emptied
