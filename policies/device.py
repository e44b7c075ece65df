"""The device, dtype and CPU threads that a process computes with."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from policies.errors import UserError

_gpu_is_others = False
"""Whether this process leaves the GPU to others; see `leave_gpu`."""


@dataclass(frozen=True)
class ComputeSettings:
    """How a process computes.

    Attributes:
        threads: Number of CPU threads; None: an even share of the cores that the process may use.
        deterministic: Use only operations that give the same results each time; others raise RuntimeError. None: where
            the process computes on a CPU. On a GPU, other operations are faster, and so are float32 products in TF32.
        processes: Processes that share the cores.
        gpu: Whether the process computes on a GPU. None: where there is one.
    """

    threads: int | None
    deterministic: bool | None = False
    processes: int = 1
    gpu: bool | None = None

    def apply(self) -> None:
        """Apply the settings to this process; call it before anything is computed on a GPU.

        Raises:
            UserError: The process is to compute on a GPU, and torch finds none.
        """
        if self.gpu is False:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif self.gpu and not torch.cuda.is_available():
            raise UserError(_missing_gpu())
        torch.set_num_threads(self.threads or max(1, cores() // self.processes))
        on_gpu = torch.cuda.is_available()
        deterministic = not on_gpu if self.deterministic is None else self.deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it for determinism
        torch.use_deterministic_algorithms(deterministic)
        if on_gpu:
            torch.backends.cuda.matmul.allow_tf32 = not deterministic
        # No result depends on uninitialised memory, and filling it costs time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _missing_gpu() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = f"it is built for CUDA {torch.version.cuda}" if torch.version.cuda else "it is a build for CPUs"
    return (
        f"Ray has given this process a GPU (CUDA_VISIBLE_DEVICES is {visible!r}), and torch {torch.__version__} finds "
        f"none ({build}): install torch for this GPU on the node, or set learner.gpus and rollouts.gpus to 0"
    )


@dataclass(frozen=True)
class ActorOptions:
    """How a Ray actor is started, and how it computes.

    Attributes:
        compute: How it computes.
        options: What Ray's `options` takes: what the actor reserves, and where it runs.
    """

    compute: ComputeSettings
    options: dict[str, Any] = field(default_factory=lambda: {"num_cpus": 1})

    @property
    def gpus(self) -> float:
        """GPUs that it reserves."""
        return float(self.options.get("num_gpus", 0))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def leave_gpu() -> Iterator[None]:
    """Have the default device of this process be the CPU within the block: other processes use the GPUs."""
    global _gpu_is_others
    previous = _gpu_is_others
    _gpu_is_others = True
    try:
        yield
    finally:
        _gpu_is_others = previous


def gpu_memory() -> int | None:
    """Bytes of memory of the GPU of this process; None: it has none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def free_memory() -> None:
    """Free what nothing refers to any more but cycles, such as those of DeepSpeed's hooks, on a GPU for others too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() and not _gpu_is_others else "cpu")


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
