"""How a process computes."""

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Computing:
    """threads: CPU threads. deterministic: whether to use only operations that give the same results each time."""

    threads: int
    deterministic: bool = False

    def begin(self) -> None:
        """Compute so from now on, in this process; before anything is computed on a GPU."""
        torch.set_num_threads(self.threads)
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(self.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no result reads it
