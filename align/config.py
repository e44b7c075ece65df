"""Experiment files: YAML with `include:`, `${…}` and overrides, into settings that are known to be right."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from align.files import write_text
from align.schema import Experiment
from policies.errors import UserError, first_line
from policies.fields import shown
from rewards.terms import SECRET

Keys = tuple[str, ...]


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The settings of an experiment file.

    Files that `include:` names, relative to the file that names them, come first; then the file itself; then the
    overrides, `key.path=value` with the value in YAML; then `${key.path}` and `${oc.env:NAME}` are put in.
    Raises UserError that lists every problem with its file, line and key.
    """
    source = _read(Path(path), ())
    for override in overrides:
        source.merge(_parse_override(override))
    try:
        values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)
    except OmegaConfBaseException as error:
        keys = tuple(str(error.full_key or "").split("."))
        said = first_line(error)
        raise UserError(f"{source.place(keys)}: {error.full_key or 'experiment'}: {said}") from None
    except RecursionError:
        raise UserError(f"{path}: a setting is put into itself by ${{…}}") from None
    _refuse_odd_text(values, (), source)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(_explain(problem, source) for problem in error.errors())
        raise UserError("\n".join(problems)) from None


NO_DEFAULT = object()


def _environment(name: str, default: Any = NO_DEFAULT) -> Any:
    """`${oc.env:NAME,default}`. What it gives is written to `config.yaml` and sent to W&B, so it gives no secret."""
    if SECRET.search(name):
        raise ValueError(
            f"{name} seems to hold a secret, which would be written to config.yaml and W&B: an endpoint reads its key "
            "by itself from the variable that key_env names"
        )
    if name not in os.environ and default is NO_DEFAULT:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ.get(name, default)


OmegaConf.register_resolver("oc.env", _environment, replace=True)


def dump_experiment(experiment: Experiment, path: Path) -> None:
    """Write all settings, defaults too, so that `load_experiment` gives the same ones again."""
    text = yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(path, text)


@dataclass
class _Source:
    """Values, and for the path of each key the file and line that it comes from."""

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Keys, str] = field(default_factory=dict)

    def merge(self, other: "_Source") -> None:
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


class _Loader(yaml.SafeLoader):
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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _read(path: Path, including: tuple[Path, ...]) -> _Source:
    """A file with all that it includes."""
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
    source = _Source(path)
    for name in names:
        part = path.parent / name
        if part.resolve() in {file.resolve() for file in (*including, path)}:
            raise UserError(f"{written.place(('include',))}: include: {part} includes itself")
        source.merge(_read(part, (*including, path)))
    source.merge(written)
    return source


def _parse(text: str, path: Path) -> _Source:
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            raise UserError(f"{path} is empty: an experiment needs at least `name` and `model.path`")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}:{node.start_mark.line + 1}: `key: value` lines were expected")
        places = {keys: f"{path}:{line}" for keys, line in _lines(node, (), path)}
        return _Source(path, yaml.load(text, Loader=_Loader), places)
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


def _refuse_odd_text(value: Any, keys: Keys, source: _Source) -> None:
    """Raise UserError where text holds what neither a file's name nor UTF-8 can."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_odd_text(name, keys, source)
            _refuse_odd_text(item, (*keys, str(name)), source)
    elif isinstance(value, list):
        for item in value:
            _refuse_odd_text(item, keys, source)
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise UserError(f"{source.place(keys)}: {'.'.join(keys)}: {value!r} holds a character that no text may have")


def _parse_override(text: str) -> _Source:
    keys, separator, value = text.partition("=")
    names = tuple(keys.strip().split("."))
    where = f"override {text!r}"
    if len(names) > MOST_DEEP:
        raise UserError(f"override {text[:80]!r}…: more than {MOST_DEEP} keys inside each other")
    if not separator or not all(names):
        raise UserError(f"{where}: key.path=value was expected, as in ppo.kl.coefficient=0.1")
    try:
        values: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: the value is no valid YAML: {error}") from None
    for name in reversed(names):
        values = {name: values}
    return _Source(Path(), values, {names: where})


def _explain(problem: Any, source: _Source) -> str:
    """A problem that pydantic found, in words for people."""
    path = tuple(str(key) for key in problem["loc"])
    keys = _written(path, source)
    if problem["type"] == "missing":
        return f"{source.place(keys)}: {'.'.join(keys)} is missing"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{source.place(keys)}: {'.'.join(keys)} is no setting; {hint}"
    # Behind the key, pydantic names the member of a union that it tried: `policy.targets.str`.
    while keys and keys not in source.places and keys[:-1] in source.places:
        keys = keys[:-1]
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    # A secret may stand where an address or a variable's name should, and messages go to logs.
    hidden = isinstance(given, dict | BaseModel) or {"url", "key_env"} & set(keys)
    got = "" if hidden else f", not {shown(given)}"
    return f"{source.place(keys)}: {'.'.join(keys) or 'experiment'}: {message}{got}"


def _written(path: Keys, source: _Source) -> Keys:
    """The key as the user wrote it: pydantic names in its path the kind of a union that it tried, as a key would be."""
    places = range(1, len(path) - 1)
    shorter = (path[:i] + path[i + 1 :] for i in places)
    if path[:-1] in source.places or path in source.places:
        return path
    return next((keys for keys in shorter if keys in source.places or keys[:-1] in source.places), path)


def _known_keys(path: Keys) -> list[str]:
    """The names of the settings under pydantic's path of keys, kinds of unions included."""
    model: type[BaseModel] = Experiment
    annotation: Any = Experiment
    for key in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[key].annotation if key in annotation.model_fields else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:  # the kind of a union
            annotation = next((kind for kind in _models(annotation) if _kind(kind) == key), None)
        inner = _models(annotation)
        if len(inner) == 1:
            annotation = inner[0]
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(model: type[BaseModel]) -> str:
    """What tells this member of a union from the others."""
    return get_args(model.model_fields["kind"].annotation)[0]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that an annotation names, itself or in a union."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    inner = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
