"""What the documents say, taken apart: code blocks and inline code; and the settings and commands that exist."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer.main
from pydantic import BaseModel

from align.cli import app
from align.config.schema import Experiment

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n*\Z")
INLINE_CODE = re.compile(r"`([^`\n]+)`")
SECTIONS = tuple(Experiment.model_fields)


def documents() -> list[Path]:
    """Every document for users and contributors."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*/README.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of code. not_run: whether a comment before it says why it cannot be run."""

    place: str
    language: str
    text: str
    not_run: bool


def blocks_of(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document."""
    text = path.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        marked = NOT_RUN.search(text[: fence.start()]) is not None
        yield Block(f"{path.relative_to(ROOT)}:{line}", fence[1], fence[2], marked)


def inline_code(path: Path) -> list[str]:
    """What stands in backticks outside fenced blocks."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return INLINE_CODE.findall(text)


def parse_align(arguments: list[str]) -> None:
    """Parse a command line of `align` without running it. Raises click's UsageError for a wrong one."""
    group = typer.main.get_command(app)
    context = group.make_context("align", list(arguments))
    name, *rest = arguments
    command = group.get_command(context, name)  # type: ignore[attr-defined]  # `align` is a group of commands
    assert command is not None, name
    command.make_context(name, rest, parent=context)


def setting_exists(key: str) -> bool:
    """Whether a dotted key names a setting or a section; names that the user chooses may be anything."""
    return _exists(Experiment, key.split("."))


def _exists(annotation: Any, names: list[str]) -> bool:
    if not names:
        return True
    first, *rest = names
    for option in _options(annotation):
        if get_origin(option) is dict:
            if _exists(get_args(option)[1], rest):
                return True
        elif isinstance(option, type) and issubclass(option, BaseModel):
            field = option.model_fields.get(first)
            if field is not None and _exists(field.annotation, rest):
                return True
    return False


def _options(annotation: Any) -> list[Any]:
    """The members of a union, without Annotated around them."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        options: list[Any] = []
        for member in get_args(annotation):
            options += _options(member)
        return options
    return [annotation]


def setting_names(annotation: Any = Experiment) -> set[str]:
    """The names of all settings, without their sections."""
    names: set[str] = set()
    for option in _options(annotation):
        if get_origin(option) in (dict, list):
            names |= setting_names(get_args(option)[-1])
        elif isinstance(option, type) and issubclass(option, BaseModel):
            for name, field in option.model_fields.items():
                names |= {field.alias or name} | setting_names(field.annotation)
    return names
