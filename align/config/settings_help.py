"""The settings of an experiment file in the terminal, and as a JSON schema for editors."""

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from align.config.reference import HEADER, sections, setting_rows, summary
from align.config.schema import Experiment
from policies.errors import UserError

DRAFT = "https://json-schema.org/draft/2020-12/schema"
INCLUDE = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    "description": "files that are read before this one, relative to it",
}
"""The key `include`, which is resolved before settings are validated."""


def settings_help(name: str | None) -> RenderableType:
    """The settings of a section, or a single one, with types, defaults and descriptions.

    Args:
        name: A section such as `ppo.kl`, or a setting such as `ppo.kl.coefficient`; None: the top level.

    Raises:
        UserError: There is no such section or setting.
    """
    found = _sections_named(name or "")
    if found:
        return Group(*(_table(title, model, setting_rows(model)) for title, model in found))
    section, _, setting = str(name).rpartition(".")
    parts = []
    for title, model in _sections_named(section):
        rows = [row for row in setting_rows(model) if row[0] == f"`{setting}`"]
        if rows:
            parts.append(_table(title, model, rows))
    if not parts:
        raise UserError(_unknown(str(name)))
    return Group(*parts)


def experiment_schema() -> dict[str, Any]:
    """The JSON schema of an experiment file, without references between settings (`${…}`)."""
    schema = Experiment.model_json_schema()
    return {"$schema": DRAFT} | schema | {"properties": {"include": INCLUDE} | schema["properties"]}


def _sections_named(name: str) -> list[tuple[str, type[BaseModel]]]:
    """The sections of this dotted name: several where `kind` tells them apart."""
    return [(title, model) for title, model in sections() if title.partition(":")[0] == name]


def _table(title: str, model: type[BaseModel], rows: list[tuple[str, ...]]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(HEADER[0], no_wrap=True)
    for column, ratio in zip(HEADER[1:], (2, 2, 5), strict=True):
        table.add_column(column, ratio=ratio, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell.replace("`", "").replace("\\|", "|")) for cell in row))
    heading = Text(f"{title}: {summary(model)}" if title else summary(model), style="bold")
    return Group(heading, Padding(table, (0, 0, 1, 0)))


def _unknown(name: str) -> str:
    """What to say where neither a section nor a setting has this name."""
    names = []
    for title, model in sections():
        section = title.partition(":")[0]
        names += [section] if section else []
        names += [f"{section}.{setting}".lstrip(".") for setting in model.model_fields]
    close = get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "`align settings` lists the sections"
    return f"{name} is neither a section nor a setting: {hint}"
