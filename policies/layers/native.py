"""Compiling what is in `kernels/` for the machine at hand, and calling what is in it.

A process that finds neither a compiled copy nor a compiler does without: transformers' own modules compute the same.
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

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def runs(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: on the CPU, of one dtype, which is float32 or bfloat16."""
    first = tensors[0]
    alike = all(tensor.dtype == first.dtype and tensor.device.type == "cpu" for tensor in tensors)
    return alike and first.dtype in SUFFIXES and library() is not None


def call(name: str, dtype: torch.dtype, *given: Any) -> None:
    """Run a kernel for numbers of this dtype on as many threads as torch uses.

    Tensors must be contiguous, of the shapes and dtypes that `kernels/` names, or given as their `data_ptr()` where the
    kernel is told how far apart its rows lie; those of the result are written to. A C float is given as a float.
    """
    function = _function(f"{name}_{SUFFIXES[dtype]}", tuple(map(type, given)))
    function(*[_address(value) if isinstance(value, Tensor) else value for value in given], torch.get_num_threads())


@cache
def _function(name: str, types: tuple[type, ...]) -> Any:
    function = getattr(library(), name)
    function.argtypes = [*(ctypes.c_float if of is float else ctypes.c_int64 for of in types), ctypes.c_int64]
    function.restype = None
    return function


def _address(tensor: Tensor) -> int:
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel was given a tensor of strides {tensor.stride()} for shape {tuple(tensor.shape)}")
    return tensor.data_ptr()


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled.

    They share the threads of torch, whose OpenMP library is in the process already.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        with suppress(OSError, RuntimeError):  # no home, none that can be written to, or a file in it is no library
            return _kept(compiler)
        with tempfile.TemporaryDirectory() as folder:
            return _made(compiler, Path(folder) / "kernels.so")
    except (OSError, subprocess.CalledProcessError):
        return None


def _kept(compiler: list[str]) -> ctypes.CDLL:
    """From the user's cache folder, under a name that says of which source, compiler and processor they are."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout
    sources = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    key = hashlib.sha256(b"\0".join([*sources, version, *map(str.encode, (*FLAGS, _processor()))]))
    kept = _cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    if kept.exists():
        return ctypes.CDLL(str(kept))
    kept.parent.mkdir(parents=True, exist_ok=True)
    return _made(compiler, kept)


def _made(compiler: list[str], to: Path) -> ctypes.CDLL:
    """Compiled, under a name of its own first: several processes may be at it."""
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        made = Path(folder) / to.name
        command = [*compiler, *FLAGS, "-Wno-psabi", str(SOURCES / "kernels.cpp"), "-o", str(made)]
        subprocess.run(command, capture_output=True, check=True)
        made.replace(to)
    return ctypes.CDLL(str(to))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "align"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
