"""Compiling `kernels.cpp` for the machine at hand, and calling what is in it.

A process that finds neither a compiled copy nor a compiler does without: transformers' own modules compute the same.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def runs(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: on the CPU, of one dtype, which is float32 or bfloat16."""
    first = tensors[0]
    alike = all(tensor.dtype == first.dtype and tensor.device.type == "cpu" for tensor in tensors)
    return alike and first.dtype in SUFFIXES and library() is not None


def call(name: str, *given: Tensor | int | float) -> None:
    """Run a kernel on as many threads as torch uses. The first tensor's dtype chooses it.

    Tensors must be contiguous, of the shapes and dtypes that `kernels.cpp` names; those of the result are written to.
    """
    made: Any = library()
    function = getattr(made, f"{name}_{SUFFIXES[given[0].dtype]}")  # type: ignore[union-attr]
    function(*map(_in_c, given), ctypes.c_int64(torch.get_num_threads()))


def _in_c(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        if not value.is_contiguous():
            raise ValueError(f"a kernel was given a tensor of strides {value.stride()} for shape {tuple(value.shape)}")
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled.

    They are kept in the user's cache folder, under a name that says of which source, compiler and processor they are,
    and share the threads of torch, whose OpenMP library is in the process already.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *map(str.encode, (*FLAGS, _processor()))]))
    kept = _cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            _compile(compiler, kept)
        return ctypes.CDLL(str(kept))
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(compiler: str, to: Path) -> None:
    """Under a name of its own first: several processes may be at it."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / to.name
        subprocess.run([compiler, *FLAGS, "-Wno-psabi", str(SOURCE), "-o", str(made)], capture_output=True, check=True)
        made.replace(to)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
