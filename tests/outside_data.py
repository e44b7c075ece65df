"""Real models and data that are not part of the project: where they are, and a skip for tests without them."""

import os
from pathlib import Path

import pytest


def outside_data(path: str = "") -> Path:
    """A file or folder in the folder that ALIGN_DATA names. Skips the test where it does not exist."""
    return _outside("ALIGN_DATA", path)


def outside_model() -> Path:
    """The folder of a small causal language model, named by ALIGN_MODEL. Skips the test where it does not exist."""
    return _outside("ALIGN_MODEL", "")


def _outside(variable: str, path: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} is not set (CONTRIBUTING.md says what it should name)")
    target = Path(folder, path).absolute()
    if not target.exists():
        pytest.skip(f"{target} does not exist ({variable} is {folder})")
    return target
