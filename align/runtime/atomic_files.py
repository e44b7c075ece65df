"""Folders and files that are written completely or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

WRITING = ".writing"
OLD = ".replaced"
REMOVING = ".removed"
"""Ends of the hidden names of files and folders that are being written, replaced and removed: `.NAME.writing`."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder atomically.

    Args:
        folder: The folder to create or replace. Missing parents are created.

    Yields:
        A temporary folder in the same parent, to fill. When the block ends without an error, its files are synced to
        disk and it is renamed to `folder`; after an error it is removed, and an existing `folder` stays as it was.
    """
    temporary = _hidden(folder, WRITING)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish_folder(temporary, folder)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Sync a complete folder to disk and give it its name in the same parent, in place of an earlier folder."""
    for path in temporary.rglob("*"):
        sync(path)
    old = _hidden(folder, OLD)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is never seen with some of its files gone."""
    removing = _hidden(folder, REMOVING)
    shutil.rmtree(removing, ignore_errors=True)
    folder.rename(removing)
    shutil.rmtree(removing)


def clean_up(folder: Path) -> None:
    """Remove what a killed process was writing or removing below a folder, and restore what it was replacing."""
    for path in sorted(folder.rglob(".*")):
        replaced = path.with_name(path.name[1:].removesuffix(OLD))
        if path.suffix == OLD and path.is_dir() and not replaced.exists():
            path.rename(replaced)
        elif path.suffix in (WRITING, OLD, REMOVING):
            _remove(path)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through a temporary one that is renamed, so that readers never see half of it."""
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file atomically.

    Yields:
        A temporary file to fill. When the block ends without an error, it is synced to disk and renamed to `path`;
        after an error it is removed, and an existing file stays as it was.
    """
    temporary = _hidden(path, WRITING)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder, to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
