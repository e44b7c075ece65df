"""On what, and how, a process computes."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ComputeSettings:
    """threads: CPU threads. deterministic: whether to use only operations that give the same results each time."""

    threads: int
    deterministic: bool = False

    def apply(self) -> None:
        """Compute so from now on, in this process; before anything is computed on a GPU."""
        torch.set_num_threads(self.threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no result reads it


def default_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype() -> str:
    """bfloat16 where the default device multiplies in it (GPUs from Ampere on, CPUs with AMX), else float32.

    Elsewhere products in bfloat16 are emulated, and several times slower than in float32.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
