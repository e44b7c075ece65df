"""docs/reference.md, which lists every setting with its type, default and description, from the schema.

python -m align.config.reference > docs/reference.md
"""

import inspect
import json
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from align.config.schema import Experiment
from policies.method_tables import markdown

INTRODUCTION = """# Reference of settings

All settings of an experiment file by section. [settings.md](settings.md) explains how the file works. The section `a.b`
is the key `b` inside `a`, `NAME` is a key of the user's choice, and an unset value is `null` in the file.

The page is generated:

```sh
.venv/bin/python -m align.config.reference > docs/reference.md
```
"""
HEADER = ("setting", "type", "default", "description")
TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "unset",
    Any: "any value",
}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def reference() -> str:
    """The whole page, in Markdown. Sections with the same settings share a table."""
    titles: dict[type[BaseModel], list[str]] = {}
    for title, model in sections():
        titles.setdefault(model, []).append(f"`{title}`" if title else "Top level")
    parts = [INTRODUCTION]
    for model, paths in titles.items():
        table = markdown([HEADER, *setting_rows(model)])
        parts.append(f"## {', '.join(paths)}\n\n{summary(model)}\n\n{table}\n")
    return "\n".join(parts)


def sections() -> list[tuple[str, type[BaseModel]]]:
    """The sections of an experiment file, each with its dotted name and its model; the top level first, without one."""
    return list(_sections("", Experiment))


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of the docstring, on one line."""
    paragraph = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0]
    return paragraph.replace("\n", " ")


def _sections(title: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """A model and, after it, the models of its fields, each with the path of its keys."""
    yield title, model
    for name, field in model.model_fields.items():
        path = f"{title}.{name}" if title else name
        yield from _nested_sections(path, field.annotation)


def _nested_sections(path: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models inside a type. The members of a union that `kind` tells apart have it in their title."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        yield from _nested_sections(path, arguments[0])
    elif get_origin(annotation) is dict:
        yield from _nested_sections(f"{path}.NAME", arguments[1])
    elif get_origin(annotation) is list:
        yield from _nested_sections(f"{path}[]", arguments[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in arguments:
            yield from _nested_sections(path, member)
    elif _is_model(annotation):
        yield from _sections(_with_kind(path, annotation), annotation)


def _with_kind(path: str, model: type[BaseModel]) -> str:
    """The path, followed by the only possible value of `kind` where the model has such a field."""
    kind = model.model_fields.get("kind")
    if kind is None or len(get_args(kind.annotation)) != 1:
        return path
    return f"{path}: {{kind: {get_args(kind.annotation)[0]}}}"


def setting_rows(model: type[BaseModel]) -> list[tuple[str, ...]]:
    """Name, type, default and description of each setting of a section, in Markdown."""
    rows: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        description = field.description or ""
        if _is_model(field.annotation) and not description:
            description = summary(field.annotation)
        rows.append(
            (
                f"`{field.alias or name}`",
                _type_in_words(field),
                _default_in_words(field),
                description.replace("|", "\\|"),
            )
        )
    return rows


def _type_in_words(field: FieldInfo) -> str:
    """The type of a setting with its bounds, such as `integer ≥ 1`."""
    bounds = []
    for name, symbol in BOUNDS:
        for constraint in field.metadata:
            if hasattr(constraint, name):
                bounds.append(f"{symbol} {getattr(constraint, name):g}")
    words = _annotation_in_words(field.annotation)
    return f"{words} {', '.join(bounds)}" if bounds else words


def _annotation_in_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _annotation_in_words(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return _union_in_words(arguments)
    if origin is list:
        return f"list of {_annotation_in_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_annotation_in_words(arguments[0])}s"
    if origin is dict:
        return f"NAME: {_annotation_in_words(arguments[1])}"
    if _is_model(annotation):
        return "section"
    return TYPE_NAMES[annotation]


def _union_in_words(members: tuple[Any, ...]) -> str:
    """The members of a union without `unset`, which the default shows."""
    words = [_annotation_in_words(member) for member in members if member is not type(None)]
    return " or ".join(dict.fromkeys(words))


def _default_in_words(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "unset"
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, dict):
        default = {name: _plain(value) for name, value in default.items()}
    return f"`{_in_yaml(default)}`"


def _plain(value: Any) -> Any:
    """A model as the settings that differ from their defaults."""
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, BaseModel) else value


def _in_yaml(value: Any) -> str:
    """A value as it stands in an experiment file, on one line."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


if __name__ == "__main__":
    print(reference(), end="")
