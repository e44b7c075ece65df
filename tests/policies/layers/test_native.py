import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from policies.layers import kernel_calls, native

COMPILE = "import torch; from policies.layers import native; print(native.library() is not None)"


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty one, and a process that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / "align"
    native.library.cache_clear()


def test_this_machine_compiles_them() -> None:
    assert native.runs(torch.zeros(1))
    assert native.runs(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16())
    assert not native.runs(torch.zeros(1).double())
    assert not native.runs(torch.zeros(1), torch.zeros(1).bfloat16())


def test_meta_tensors_take_the_path_of_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.zeros(3, 4, device="meta")
    assert native.runs(meta, meta)
    assert not native.runs(meta, torch.zeros(1))
    assert not native.runs(torch.zeros(1), meta)
    assert kernel_calls.swiglu(meta, meta).shape == meta.shape  # no kernel reads from a null pointer
    monkeypatch.setattr(native, "default_device", lambda: torch.device("cuda"))  # simulated
    assert not native.runs(meta, meta)


def test_they_are_compiled_once(cache_folder: Path) -> None:
    assert native.library() is not None
    (compiled,) = cache_folder.iterdir()
    before = compiled.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library() is not None
    assert [compiled] == list(cache_folder.iterdir())
    assert compiled.stat().st_mtime_ns == before


@pytest.mark.slow
def test_several_processes_may_compile_at_once(cache_folder: Path) -> None:
    command = [sys.executable, "-c", COMPILE]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 3
    assert len(list(cache_folder.iterdir())) == 1


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_that_works_there_are_none(
    compiler: str, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert native.library() is None
    assert not native.runs(torch.zeros(1))
    assert not cache_folder.exists() or not list(cache_folder.iterdir())


@pytest.mark.parametrize("trouble", ["no folder", "no home", "no library"])
def test_they_are_compiled_for_one_process_where_they_cannot_be_cached(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    if trouble == "no folder":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif trouble == "no home":
        monkeypatch.setattr(native, "cache_folder", Path("~nobody-at-all").expanduser)
    else:
        assert native.library() is not None
        (compiled,) = cache_folder.iterdir()
        compiled.unlink()  # the library that is loaded stays complete
        compiled.write_text("no library")
        native.library.cache_clear()
    assert native.runs(torch.zeros(1))
    out = kernel_calls.swiglu(torch.ones(2), torch.ones(2))
    torch.testing.assert_close(out, torch.nn.functional.silu(torch.ones(2)))


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    x = torch.zeros(4, 4).T
    with pytest.raises(ValueError, match=r"strides \(1, 4\) for shape \(4, 4\)"):
        kernel_calls.swiglu_backward(x, x, x)


def test_torch_and_the_kernels_share_their_threads() -> None:
    """Two OpenMP libraries in one process would fight over the cores."""
    libraries = {os.path.realpath(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert native.library() is not None
    assert len([name for name in libraries if "libgomp.so" in name]) == 1
