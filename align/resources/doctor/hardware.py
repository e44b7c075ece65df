"""Checks what a run computes with: GPUs or the CPU, its cores, and the compiled kernels."""

import math
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

from align.resources.doctor.finding import Finding, ok, problem, warning
from align.runtime.wording import counted
from policies.errors import first_line

DRIVER = Path("/proc/driver/nvidia/version")
"""A file that the kernel has where NVIDIA's driver is loaded."""
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The limits of this process's container."""
GIB = 2**30


def check_device() -> Finding:
    """Whether torch finds the GPUs of this machine, and can compute on each."""
    import torch

    if torch.cuda.is_available():
        return _check_gpus()
    if has_nvidia_driver():
        return _unused_gpu()
    return ok(_cpu())


def has_nvidia_driver() -> bool:
    """Whether this machine has NVIDIA's driver."""
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def _check_gpus() -> Finding:
    import torch

    from policies.device import fast_dtype

    names = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            torch.ones(2, device=f"cuda:{index}").sum().item()
            _, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            return problem(
                f"torch {torch.__version__} cannot compute on GPU {index} ({name}): {first_line(error)}",
                "end the processes that `nvidia-smi` lists there, or install a torch that is built for this GPU",
            )
        names.append(f"{name}, {total / GIB:.0f} GiB")
    return ok(f"{counted(len(names), 'GPU')}: {'; '.join(names)}; model.dtype auto is {fast_dtype()}")


def _unused_gpu() -> Finding:
    """Why torch finds no GPU on a machine that has NVIDIA's driver."""
    import torch

    version = torch.__version__
    if not torch.version.cuda:
        released, _, _ = version.partition("+")
        return warning(
            f"{_cpu()}. NVIDIA's driver is installed, but torch {version} is a build for CPUs",
            f"pip install --force-reinstall torch=={released} from an index with builds for CUDA (--index-url)",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return warning(f"{_cpu()}. CUDA_VISIBLE_DEVICES is {visible!r}, and torch finds no GPU", "unset it to use GPUs")
    return warning(
        f"{_cpu()}. NVIDIA's driver is installed, but torch {version} finds no GPU",
        f"if `nvidia-smi` lists one, install a driver for CUDA {torch.version.cuda}, or a torch for the driver's CUDA",
    )


def _cpu() -> str:
    """The CPU, and the dtype that is fast on it."""
    from policies.device import fast_dtype

    dtype = fast_dtype()
    instructions = "has" if dtype == "bfloat16" else "lacks"
    return f"CPU ({platform.machine()}), which {instructions} AMX: model.dtype auto is {dtype}"


def check_cores() -> Finding:
    """Whether this process may use the time of all cores on which torch starts threads."""
    from policies.device import cores

    available = cores()
    words = f"{available} of {counted(os.cpu_count() or available, 'core')}"
    quota = cpu_quota(CONTROL_GROUP)
    if quota is None or quota >= available:
        return ok(words)
    return warning(
        f"{words}, but the container has the CPU time of {quota:g}: more threads wait for each other",
        f"set cluster.threads to {math.ceil(quota)}",
    )


def cpu_quota(folder: Path) -> float | None:
    """The number of cores whose time a container may use; None where it has no limit.

    Args:
        folder: The control group of the container, of version 2 or 1.
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except OSError:
        try:
            quota = (folder / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def check_compiler() -> Finding:
    """Whether the kernels can be compiled for this machine. A GPU computes without them."""
    import torch

    from policies.layers import native

    command = native.compiler()
    fault = None
    if shutil.which(command[0]) is None:
        fault = f"no C++ compiler: there is no {command[0]} on PATH"
    else:
        try:
            native.load_library()
        except subprocess.CalledProcessError as error:
            fault = f"{shlex.join(command)} cannot compile the kernels: {_compiler_error(error)}"
        except OSError as error:
            fault = f"the compiled kernels cannot be loaded: {first_line(error)}"
    if fault is None:
        return ok(f"the kernels are compiled by {_compiler_version(command)}")
    cure = "install g++ (Debian and Ubuntu: apt install g++), or set CXX to a C++17 compiler with OpenMP"
    if torch.cuda.is_available():
        return warning(f"{fault}; only computing on the CPU is slower", cure)
    return problem(f"{fault}; every stage is slower without", cure)


def _compiler_error(error: subprocess.CalledProcessError) -> str:
    """The first error among the lines that a compiler has written."""
    lines = error.stderr.decode(errors="replace").splitlines()
    first = next((line for line in lines if "error" in line), None)
    return first or (lines[0] if lines else f"exit status {error.returncode}")


def _compiler_version(command: list[str]) -> str:
    """The first line of a compiler's description of itself."""
    written = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    return next(iter(written.splitlines()), shlex.join(command))
