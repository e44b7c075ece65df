"""Checkpoints: folders `step-N` with a manifest of all files, written under a temporary name and then renamed."""

import hashlib
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align.runtime.atomic_files import new_folder, remove_folder, write_json
from policies.errors import UserError
from policies.files.safe_reading import read_object

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class CheckpointTimer:
    """When the next checkpoint is due: every so many steps, and so many minutes after the last."""

    def __init__(self, every: int, minutes: float) -> None:
        """Start to count the minutes.

        Args:
            every: Steps between checkpoints.
            minutes: Minutes after the last checkpoint, or after the start, from which the next is due.
        """
        self.every = every
        self.seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Count the minutes from now: a checkpoint has been written."""
        self.started = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due at the end of this step, counted from 1."""
        return step % self.every == 0 or time.monotonic() - self.started >= self.seconds


@contextmanager
def new_checkpoint(folder: Path, step: int, keep: int) -> Iterator[Path]:
    """Write a checkpoint.

    Args:
        folder: The folder of the stage's checkpoints.
        step: The step after which it is written.
        keep: How many checkpoints are kept, this one included; older ones are removed.

    Yields:
        A temporary folder to fill, which becomes `folder/step-N` when the block ends without an error.
    """
    with new_folder(folder / f"step-{step}") as temporary:
        yield temporary
        seal(temporary)
    prune(folder, keep)


def prune(folder: Path, keep: int, last: Path | None = None) -> None:
    """Remove the older checkpoints of a stage.

    Args:
        folder: The folder of the stage's checkpoints.
        keep: How many are kept.
        last: The last one that counts, where newer ones are damaged; None: the newest.
    """
    found = checkpoints(folder)
    if last is not None:
        found = [checkpoint for checkpoint in found if step_of(checkpoint) <= step_of(last)]
    for old in found[:-keep]:
        remove_folder(old)


def seal(folder: Path) -> None:
    """Write the manifest: each file with its size and SHA-256, and the version of align."""
    files: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[str(path.relative_to(folder))] = _size_and_hash(path)
    write_json(folder / MANIFEST, {"version": version("align-rlhf"), "files": files})


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _is_checkpoint(path)), key=step_of)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step-[0-9]{1,18}", path.name) is not None and path.is_dir() and not path.is_symlink()


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def latest(folder: Path) -> Path | None:
    """Find the newest complete checkpoint of a stage. A damaged one is skipped with a warning.

    Args:
        folder: The folder of the stage's checkpoints.

    Returns:
        The checkpoint, or None where there is none.

    Raises:
        UserError: There are checkpoints, and all of them are damaged.
    """
    newest_error: UserError | None = None
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except UserError as error:
            newest_error = newest_error or error
            log.warning("%s: looking for an older checkpoint", error)
        else:
            return checkpoint
    if newest_error:
        raise newest_error
    return None


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint with its manifest.

    Args:
        checkpoint: A folder `step-N`.

    Raises:
        UserError: A file is missing, damaged or not in the manifest; the message names it.
    """
    listed = _read_manifest(checkpoint)
    present = _files_in(checkpoint)
    for name, expected in listed.items():
        # Only files found in the folder are opened, whatever names the manifest contains.
        if name not in present:
            raise UserError(f"checkpoint {checkpoint}: {name} is missing")
        if expected != _size_and_hash(present[name]):
            raise UserError(f"checkpoint {checkpoint}: {name} is damaged")
    extra = sorted(present.keys() - listed.keys())
    if extra:
        raise UserError(f"checkpoint {checkpoint}: {extra[0]} is not in its manifest")


def _read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The size and hash of each file by its name. Raises UserError where the manifest cannot be read."""
    try:
        files = read_object(checkpoint / MANIFEST).get("files")
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}: {error}") from error
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}: `files` does not map names to objects")
    return files


def _files_in(checkpoint: Path) -> dict[str, Path]:
    """All files but the manifest by their relative name. Raises UserError for links and other special files."""
    files: dict[str, Path] = {}
    for path in checkpoint.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"checkpoint {checkpoint}: {path.relative_to(checkpoint)} is neither a file nor a folder")
        if path.is_file():
            files[str(path.relative_to(checkpoint))] = path
    files.pop(MANIFEST, None)
    return files


def _size_and_hash(path: Path) -> dict[str, int | str]:
    """The manifest's entry of a file. Raises UserError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
