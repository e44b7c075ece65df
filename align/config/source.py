"""Reads YAML files with `include:`, and remembers the file and line where each value was set."""

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
    """Values, and the file and line that set each of them, by the path of its keys.

    Attributes:
        file: The file.
        values: The values.
        places: File and line by the path of a key.
        included: The files that it includes, and those that they include.
    """

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)
    included: list[Path] = field(default_factory=list)

    def merge(self, other: "Source") -> None:
        """Override these values by those of `other`: mappings key by key, anything else as a whole."""
        _merge(self.values, other.values)
        self.places |= other.places

    def forget(self, keys: Keys) -> None:
        """Remove a key that may be set, and the places of everything under it."""
        section: Any = self.values
        for name in keys[:-1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(keys[-1], None)
        self.places = {path: place for path, place in self.places.items() if path[: len(keys)] != keys}

    def place(self, keys: Keys) -> str:
        """File and line of a key or, if it was not set, of the innermost section around it that was; else the file."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return str(self.file)


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


MAX_NODES = 10_000
"""Limit on the values in a file, each alias counted in full: nested aliases grow exponentially."""
MAX_DEPTH = 32
"""Limit on nesting, well within Python's recursion limit."""


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans, and aliases that cannot exhaust memory.

    1e-4 is a number, and only true and false are booleans: YAML 1.1, which PyYAML reads, takes no, off, yes and on for
    booleans too, so that these words could be neither text nor keys. Settings that are booleans accept them all.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.nodes = self.depth = 0
        self.sizes: dict[str | None, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As SafeLoader's, with limits. Raises MarkedYAMLError for too many nodes, or one that contains itself."""
        event = self.peek_event()
        mark = event.start_mark
        nodes_before = self.nodes
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self.sizes:
                raise yaml.MarkedYAMLError(problem=f"{anchor} contains itself", problem_mark=mark)
            self.nodes += self.sizes.get(anchor, 0)
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES} values, or nested more than {MAX_DEPTH} deep", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor is not None and not isinstance(event, yaml.AliasEvent):
            self.sizes[anchor] = self.nodes - nodes_before
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As SafeLoader's, which lets Python's own errors through for `2024-13-45` or `!!bool x`."""
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"not a valid {kind}: {error}", problem_mark=node.start_mark) from None


BOOLEAN_TAG = "tag:yaml.org,2002:bool"


def _without_booleans(resolvers: list[tuple[str, re.Pattern[str]]]) -> list[tuple[str, re.Pattern[str]]]:
    return [(tag, pattern) for tag, pattern in resolvers if tag != BOOLEAN_TAG]


FLOAT = ("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
"""Tag, pattern and first characters of numbers such as 1e-4."""
Loader.yaml_implicit_resolvers = {
    first: _without_booleans(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(*FLOAT)
Loader.add_implicit_resolver(BOOLEAN_TAG, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
"""What a key can be: text, or `<<`, which merges a mapping."""


def read_source(path: Path, including: tuple[Path, ...] = (), included_at: str = "") -> Source:
    """Read a file with everything that it includes.

    Args:
        path: The file.
        including: The files that include this one, outermost first.
        included_at: The file and line of the `include:` that names this file, if one does.

    Raises:
        UserError: A file cannot be read or is not valid YAML, or files include each other.
    """
    included_by = f"{included_at}: include: " if included_at else ""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{included_by}{path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{included_by}{path} is a folder; expected an experiment file") from None
    except (OSError, ValueError) as error:  # not UTF-8, or not a possible file name
        raise UserError(f"{included_by}{str(path)!r} cannot be read: {error}") from None
    contents = _parse(text, path)
    source = Source(path)
    include_line = contents.place(("include",))
    for part in _included_files(contents, path):
        if part.resolve() in {file.resolve() for file in (*including, path)}:
            raise UserError(f"{include_line}: include: {part} includes itself")
        inner = read_source(part, (*including, path), include_line)
        source.merge(inner)
        source.included += [part, *inner.included]
    source.merge(contents)
    return source


def _included_files(source: Source, path: Path) -> list[Path]:
    """Take `include:` out of a file's values."""
    included = source.values.pop("include", [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
        raise UserError(f"{source.place(('include',))}: include: expected a file name or a list of file names")
    return [path.parent / name for name in names]


def _parse(text: str, path: Path) -> Source:
    try:
        node = yaml.compose(text, Loader=Loader)
        if node is None:
            raise UserError(f"{path} is empty: an experiment needs at least `name` and `model.path`")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{node.start_mark.line + 1}: expected lines of the form `key: value`")
        places = {keys: f"{path}:{line}" for keys, line in _lines(node, (), path)}
        return Source(path, yaml.load(text, Loader=Loader), places)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{place}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _lines(node: yaml.MappingNode, above: Keys, path: Path) -> Iterator[tuple[Keys, int]]:
    """Every key's path and line.

    Raises:
        UserError: A key is not text, or is set twice: YAML would silently drop the first.
    """
    seen: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        line = key.start_mark.line + 1
        keys = (*above, name)
        if isinstance(key, yaml.ScalarNode) and key.tag not in KEY_TAGS:
            raise UserError(f"{path}:{line}: {'.'.join(keys)}: expected text as a key: put it in quotes")
        if name in seen:
            raise UserError(f"{path}:{line}: {'.'.join(keys)} is set twice, first on line {seen[name]}")
        seen[name] = line
        yield keys, line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, keys, path)
