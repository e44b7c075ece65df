"""Finds files of the user that Python imports in place of align's own packages."""

from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("policies", "rewards", "rollouts")
"""The packages beside `align`, whose names a user's file may have, too."""


def hidden_package() -> str | None:
    """Say which file hides which of the packages beside `align` in this process; None where none does.

    Python looks first in the current folder in a notebook and for `python -m`, and in a script's own folder.
    """
    return _hidden(find_spec)


def package_hidden_from_workers() -> str | None:
    """Say which file would hide which package in Ray's workers, which look in the current folder first."""
    return _hidden(lambda name: PathFinder.find_spec(name, [str(Path.cwd())]))


def _hidden(find: Callable[[str], ModuleSpec | None]) -> str | None:
    home = Path(__file__).resolve().parents[2]
    for name in PACKAGES:
        spec = find(name)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin)
        if file.resolve().parent != home / name or file.stem != "__init__":
            return (
                f"{file} hides the package `{name}` of align, because Python looks in its folder first: rename it, "
                "and start Python again"
            )
    return None
