"""Checkpoints: folders `step-N` with a manifest of every file, written under another name and then renamed."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from align.files import new_folder, write_json
from policies.errors import UserError

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
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"version": version("align-rlhf"), "files": files})


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a stage, oldest first."""
    return sorted(folder.glob("step-*"), key=step_of)


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
        listed: dict[str, dict[str, str | int]] = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {checkpoint} has no readable {MANIFEST}") from error
    present = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST}
    for name, facts in listed.items():
        if name not in present:
            raise UserError(f"checkpoint {checkpoint} lacks {name}")
        if _sha256(checkpoint / name) != facts.get("sha256"):
            raise UserError(f"checkpoint {checkpoint}: {name} is damaged")
    if extra := sorted(present - listed.keys()):
        raise UserError(f"checkpoint {checkpoint}: {extra[0]} is not in its manifest")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
