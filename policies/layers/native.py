"""Compiles the kernels in `kernels/` for this machine and calls them; `kernel_calls` has a typed function for each.

A process that finds neither a compiled library nor a compiler runs without them: the modules of transformers compute
the same.

Tensors on the meta device stand for tensors of the process's default device: they take the same path through the
layers, and a kernel leaves them as they are.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.device import default_device

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
"""Compiler flags. Without -ffast-math, under which a NaN need not stay a NaN."""
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""The last part of a C function's name, by the dtype that it is compiled for."""
META = None
"""The address of a tensor that lies nowhere."""


def runs(*tensors: Tensor) -> bool:
    """Whether the kernels can compute with these tensors: all on the CPU, all float32 or all bfloat16."""
    first = tensors[0]
    dtype = first.dtype
    device = "meta" if first.is_meta and default_device().type == "cpu" else "cpu"
    same = all(tensor.dtype == dtype and tensor.device.type == device for tensor in tensors)
    return same and dtype in SUFFIXES and library() is not None


def call(name: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
    """Run a kernel for numbers of this dtype on as many threads as torch uses.

    Args:
        name: The C function without its dtype suffix.
        dtype: torch.float32 or torch.bfloat16.
        arguments: In the order of the C function. A tensor must be contiguous and is passed as its address; a Python
            float is passed as a C float, an int as an int64. Result tensors are written to. Nothing is run where one
            is on the meta device.

    Raises:
        ValueError: A tensor is not contiguous.
    """
    values = [_address(value) if isinstance(value, Tensor) else value for value in arguments]
    if META in values:
        return
    function = _function(f"{name}_{SUFFIXES[dtype]}", tuple(map(type, arguments)))
    function(*values, torch.get_num_threads())


@cache
def _function(name: str, types: tuple[type, ...]) -> Any:
    function = getattr(library(), name)
    function.argtypes = [*(ctypes.c_float if kind is float else ctypes.c_int64 for kind in types), ctypes.c_int64]
    function.restype = None
    return function


def _address(tensor: Tensor) -> int | None:
    """Where a tensor lies in memory; `META` on the meta device."""
    if tensor.is_meta:
        return META
    if not tensor.is_contiguous():
        raise ValueError(
            "a kernel takes contiguous tensors only; "
            f"this one has strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )
    return tensor.data_ptr()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled.

    They share the threads of torch, whose OpenMP library is already in the process.
    """
    try:
        return load_library()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_library() -> ctypes.CDLL:
    """Load the compiled kernels, after compiling them where the cache does not have them.

    Raises:
        OSError: There is no compiler, or what it has compiled cannot be loaded.
        subprocess.CalledProcessError: The compiler has failed; `stderr` has its messages.
    """
    # There may be no home folder, none that is writable, or a cached file that is not a library.
    with suppress(OSError, RuntimeError):
        return _cached_library(compiler())
    with tempfile.TemporaryDirectory() as folder:
        return _compile(compiler(), Path(folder) / "kernels.so")


def compiler() -> list[str]:
    """The command of the C++ compiler."""
    return shlex.split(os.environ.get("CXX") or "c++")


def _cached_library(command: list[str]) -> ctypes.CDLL:
    """The library in the user's cache folder; its name is a hash of sources, compiler, flags and processor."""
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*sources, version, *map(str.encode, (*FLAGS, _processor()))]))
    cached = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    if cached.exists():
        return ctypes.CDLL(str(cached))
    cached.parent.mkdir(parents=True, exist_ok=True)
    return _compile(command, cached)


def _compile(command: list[str], target: Path) -> ctypes.CDLL:
    """Compile to a temporary file and rename it: several processes may compile at the same time."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled = Path(folder) / target.name
        line = [*command, *FLAGS, "-Wno-psabi", str(SOURCES / "kernels.cpp"), "-o", str(compiled)]
        subprocess.run(line, capture_output=True, check=True)
        compiled.replace(target)
    return ctypes.CDLL(str(target))


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises RuntimeError where there is no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"


def _processor() -> str:
    """The processor's features, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
