"""Measures the peak memory of a process."""

from pathlib import Path

import torch

from policies.device import default_device

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
"""Linux files of this process: its memory, and what resets the peak of it (proc(5))."""


class MemoryMeter:
    """Measures the peak memory of this process since the meter was made.

    On a GPU it is that of torch's tensors. On a CPU it is resident memory, above what the process had at first; so
    libraries that are imported later count, and what the allocator keeps for later. Of several meters in a process, the
    newest is right.
    """

    def __init__(self) -> None:
        """Start to measure."""
        self._on_gpu = default_device().type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._before = _reset_peak()

    def peak(self) -> int | None:
        """The peak in bytes; None where the system does not tell."""
        if self._on_gpu:
            return torch.cuda.max_memory_allocated()
        if self._before is None:
            return None
        return max(0, _resident("VmHWM") - self._before)


def _reset_peak() -> int | None:
    """Make the resident memory its own peak, and return it in bytes; None where the system does not allow it."""
    try:
        RESET.write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(name: str) -> int:
    """Bytes of a line of the status, which is in KiB."""
    for line in STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise KeyError(name)
