"""YAML files with `include:` and overrides, as values that remember the file and line where each was set."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from policies.errors import UserError

Keys = tuple[str, ...]


@dataclass
class Source:
    """Values, and for the path of each key the file and line that it comes from."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def merge(self, other: "Source") -> None:
        """Lay `other` over this: mappings key by key, anything else as a whole."""
        _merge(self.values, other.values)
        self.places |= other.places

    def place(self, keys: Keys) -> str:
        """Where a key was set, or the innermost of those around it, or else the file."""
        around = (keys[:length] for length in range(len(keys), 0, -1))
        return next((self.places[k] for k in around if k in self.places), str(self.file))


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


MOST_NODES, MOST_DEEP = 10_000, 32
"""How much YAML may hold, each alias counted as all that it stands for, and how deep it may nest."""


class Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as people mean it, and in which aliases cannot stand for more than fits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.nodes = self.depth = 0
        self.sizes: dict[str | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As SafeLoader's, counted. Raises MarkedYAMLError for too many nodes, or one that holds itself."""
        event = self.peek_event()
        mark, before = event.start_mark, self.nodes
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self.sizes:
                raise yaml.MarkedYAMLError(problem=f"{anchor} holds itself", problem_mark=mark)
            self.nodes += self.sizes.get(anchor, 0)
        self.nodes += 1
        self.depth += 1
        if self.nodes > MOST_NODES or self.depth > MOST_DEEP:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_NODES} values, or more than {MOST_DEEP} inside each other", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[anchor] = self.nodes - before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As SafeLoader's, which lets Python's own errors through for 2024-13-45 or `!!bool x`."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"no {kind}: {error}", problem_mark=node.start_mark) from None


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_source(path: Path, including: tuple[Path, ...] = ()) -> Source:
    """A file with all that it includes. including: the files that led here. Raises UserError where one is no YAML."""
    asked = f"{including[-1]}: include: " if including else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{asked}{path} does not exist") from None
    except (OSError, ValueError) as error:  # no UTF-8, or a name that no file can have
        raise UserError(f"{asked}{str(path)!r} cannot be read: {error}") from None
    written = _parse(text, path)
    included = written.values.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise UserError(f"{written.place(('include',))}: include: a file name or a list of them was expected")
    source = Source(path)
    for name in names:
        part = path.parent / name
        if part.resolve() in {file.resolve() for file in (*including, path)}:
            raise UserError(f"{written.place(('include',))}: include: {part} includes itself")
        source.merge(read_source(part, (*including, path)))
    source.merge(written)
    return source


def _parse(text: str, path: Path) -> Source:
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            raise UserError(f"{path} is empty: an experiment needs at least `name` and `model.path`")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{node.start_mark.line + 1}: `key: value` lines were expected")
        places = {keys: f"{path}:{line}" for keys, line in _lines(node, (), path)}
        return Source(path, yaml.load(text, Loader=Loader), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: no valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: no valid YAML: {error}") from None


def _lines(node: yaml.MappingNode, above: Keys, path: Path) -> Iterator[tuple[Keys, int]]:
    """Every key's path and line. Raises UserError for a key that stands twice: YAML would drop the first in silence."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        keys = (*above, name)
        if name in seen:
            raise UserError(f"{path}:{line}: {'.'.join(keys)} is set twice, first in line {seen[name]}")
        seen[name] = line
        yield keys, line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, keys, path)


def parse_override(text: str) -> Source:
    """`key.path=value`. Raises UserError where it is anything else."""
    keys, separator, value = text.partition("=")
    names = tuple(keys.strip().split("."))
    where = f"override {text!r}"
    if len(names) > MOST_DEEP:
        raise UserError(f"override {text[:80]!r}…: more than {MOST_DEEP} keys inside each other")
    if not separator or not all(names):
        raise UserError(f"{where}: key.path=value was expected, as in ppo.kl.coefficient=0.1")
    try:
        values: Any = yaml.load(value, Loader=Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is no valid YAML: {error}") from None
    for name in reversed(names):
        values = {name: values}
    return Source(Path(), values, {names: where})
