"""Checkpoints: folders `step-N` with a manifest of every file, written under another name and then renamed."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from align.runtime.atomic_files import new_folder, write_json
from policies.errors import UserError
from policies.files.safe_reading import read_object

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


@contextmanager
def new_checkpoint(folder: Path, step: int, keep: int) -> Iterator[Path]:
    """A folder to fill, which becomes `folder/step-N` when the block ends; of the older ones `keep - 1` stay."""
    with new_folder(folder / f"step-{step}") as temporary:
        yield temporary
        seal(temporary)
    prune(folder, keep)


def prune(folder: Path, keep: int) -> None:
    """Remove all checkpoints of a stage but the last `keep`."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def seal(folder: Path) -> None:
    """Write the manifest: every file with its size and SHA-256, and the version of the code."""
    files = {
        str(path.relative_to(folder)): _facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
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
    """The newest whole checkpoint of a stage; None where there is none. What is passed over is said in a warning.

    Raises UserError where there are checkpoints and all of them are damaged.
    """
    damage: UserError | None = None
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except UserError as error:
            damage = damage or error
            log.warning("%s: looking for an older one", error)
        else:
            return checkpoint
    if damage:
        raise damage
    return None


def verify(checkpoint: Path) -> None:
    """Raise UserError, naming the file, where a checkpoint is not what its manifest says."""
    try:
        listed = read_object(checkpoint / MANIFEST).get("files")
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}: {error}") from error
    if not isinstance(listed, dict) or not all(isinstance(facts, dict) for facts in listed.values()):
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}: its `files` are no objects by name")
    present = {}
    for path in checkpoint.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UserError(f"checkpoint {checkpoint}: {path.relative_to(checkpoint)} is neither file nor folder")
        if path.is_file():
            present[str(path.relative_to(checkpoint))] = path
    present.pop(MANIFEST, None)
    for name, facts in listed.items():
        # Only what was found here is opened, whatever names the manifest has.
        if name not in present:
            raise UserError(f"checkpoint {checkpoint} lacks {name}")
        if facts != _facts(present[name]):
            raise UserError(f"checkpoint {checkpoint}: {name} is damaged")
    if extra := sorted(present.keys() - listed.keys()):
        raise UserError(f"checkpoint {checkpoint}: {extra[0]} is not in its manifest")


def _facts(path: Path) -> dict[str, int | str]:
    """What a manifest says of a file. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
