"""Checks the folders that runs write to, and their free space."""

import os
import shutil
import tempfile
from pathlib import Path

from align.resources.doctor.finding import Finding, ok, problem, warning

LITTLE_SPACE = 1e9
"""Free bytes under which the user is warned: a checkpoint of a small model may take as many."""
ENOUGH_TO_TRY = b"\0" * 4096
"""What is written to find out whether something can be written: a disk or a quota may be full."""


def check_runs(runs: str) -> Finding:
    """Whether runs can be written in a folder, which may be missing."""
    folder = Path(runs).absolute()
    advice = "set `runs` to a folder that can be written: align run EXPERIMENT runs=FOLDER"
    if obstacle := _obstacle(folder):
        return problem(f"nothing can be written in {folder}: {obstacle}", advice)
    return _judge_space(folder, f"free space there, or {advice}")


def check_temporary() -> Finding:
    """Whether temporary files can be written where the user wants them."""
    advice = "set TMPDIR to a folder that can be written"
    try:
        folder = Path(tempfile.gettempdir())
    except FileNotFoundError:
        return problem("nothing can be written in TMPDIR, /tmp, /var/tmp and the current folder", advice)
    wanted = os.environ.get("TMPDIR")
    if wanted and Path(wanted).absolute() != folder:
        return warning(f"nothing can be written in TMPDIR {wanted}: temporary files go to {folder}", advice)
    return _judge_space(folder, "free space there, or set TMPDIR to a folder with more")


def check_caches() -> Finding:
    """Whether the caches of compiled kernels and of what comes from the hub can be written."""
    from huggingface_hub import constants

    from policies.layers import native

    try:
        kernels = native.cache_folder()
    except RuntimeError:
        return warning("there is no home folder for caches", "set HOME, or XDG_CACHE_HOME and HF_HOME")
    if obstacle := _obstacle(kernels):
        found = f"nothing can be written in {kernels}: {obstacle}; each process compiles the kernels again"
        return warning(found, "set XDG_CACHE_HOME to a folder that can be written")
    hub = Path(constants.HF_HUB_CACHE)
    if obstacle := _obstacle(hub):
        found = f"nothing can be written in {hub}: {obstacle}; nothing can be downloaded from the hub"
        return warning(found, "set HF_HOME to a folder that can be written")
    return ok(f"{kernels}; {hub}")


def _judge_space(folder: Path, advice: str) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free
    if free < LITTLE_SPACE:
        return warning(f"{folder}: only {free / 1e9:.2f} GB are free", advice)
    return ok(f"{folder}, {free / 1e9:,.0f} GB free")


def _obstacle(folder: Path) -> str | None:
    """Why nothing can be written in a folder, which may be missing; None where something can be."""
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(ENOUGH_TO_TRY)
            file.flush()
    except OSError as error:
        where = "" if existing == folder else f"{existing}: "
        return f"{where}{error.strerror}"
    return None


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
