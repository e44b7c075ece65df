"""The device, dtype and CPU threads that a process computes with."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ComputeSettings:
    """How a process computes.

    Attributes:
        threads: Number of CPU threads.
        deterministic: Use only operations that give the same results each time; others raise RuntimeError. None: where
            the process computes on a CPU. On a GPU, other operations are faster, and so are float32 products in TF32.
    """

    threads: int
    deterministic: bool | None = False

    def apply(self) -> None:
        """Apply the settings to this process; call it before anything is computed on a GPU."""
        torch.set_num_threads(self.threads)
        on_gpu = torch.cuda.is_available()
        deterministic = not on_gpu if self.deterministic is None else self.deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for determinism
        torch.use_deterministic_algorithms(deterministic)
        if on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = not deterministic
        # No result depends on uninitialised memory, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Device:
    """The default device of a process, for messages and for the choice of a dtype.

    Attributes:
        name: The name of the device, such as "NVIDIA H100" or "CPU".
        fast_dtype: See `fast_dtype`.
    """

    name: str
    fast_dtype: str


def describe_device() -> Device:
    """The default device of this process."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return Device(name, fast_dtype())


def fast_dtype() -> str:
    """bfloat16 where the default device has instructions for it (GPUs since Ampere, CPUs with AMX), else float32.

    Without them, matrix products in bfloat16 are emulated, and several times slower than in float32.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
