"""Explains to the user what pydantic finds wrong with an experiment."""

import difflib
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from align.config.foreign_names import FOREIGN_NAMES
from align.config.old_names import OLD_NAMES, OLD_VALUES
from align.config.schema import Experiment
from align.config.source import Keys, Source
from policies.text.columns import shown


def explain(problem: Any, source: Source) -> str:
    """Turn one of `ValidationError.errors()` into a message: file and line, key, and what would be valid."""
    path = tuple(str(key) for key in problem["loc"])
    keys = _written_keys(path, source)
    if problem["type"] == "missing":
        return f"{source.place(keys)}: {'.'.join(keys)} is missing"
    if problem["type"] == "extra_forbidden":
        hint = _hint(keys, problem["input"], _valid_keys(path[:-1]))
        return f"{source.place(keys)}: {'.'.join(keys)}: unknown key; {hint}"
    # After the key, pydantic names the member of a union that it tried: `policy.targets.str`.
    while keys and keys not in source.places and keys[:-1] in source.places:
        keys = keys[:-1]
    where = f"{source.place(keys)}: {'.'.join(keys) or 'experiment'}"
    value = problem["input"]
    if new_value := _new_value(keys, value):
        return f"{where}: {value} has been renamed to {new_value}"
    message = problem["msg"].removeprefix("Value error, ")
    # Messages go to logs, and a secret may be given by mistake as an address or as the name of a variable.
    is_hidden = isinstance(value, dict | BaseModel) or {"url", "key_env"} & set(keys)
    return f"{where}: {message}" if is_hidden else f"{where}: {message}, not {shown(value)}"


def _hint(keys: Keys, value: object, valid: list[str]) -> str:
    """What to write instead of an unknown key."""
    key = ".".join(keys)
    if new_name := OLD_NAMES.get(key) or OLD_NAMES.get(".".join(_any_term(keys))):
        new_value = _new_value(keys, value)
        new_key = f"{'.'.join(keys[:-1])}.{new_name.rpartition('.')[2]}"
        return f"it has been renamed to {new_key}" + (f", and {value} to {new_value}" if new_value else "")
    if foreign := FOREIGN_NAMES.get(keys[-1]):
        return foreign if isinstance(foreign, str) else f"align calls it {_in_section(keys[0], foreign)}"
    if near := difflib.get_close_matches(keys[-1], valid, n=1):
        return f"did you mean {near[0]}?"
    return f"valid keys: {', '.join(valid)}"


def _any_term(keys: Keys) -> Keys:
    """Replace the name of a reward term by `*`."""
    return (*keys[:2], "*", *keys[3:]) if keys[:2] == ("reward", "terms") else keys


def _new_value(keys: Keys, value: object) -> str | None:
    return OLD_VALUES.get((".".join(keys), value)) if isinstance(value, str) else None


def _in_section(section: str, settings: tuple[str, ...]) -> str:
    """The settings of a section, or all of them if none is in the section."""
    return " or ".join([name for name in settings if name.startswith(f"{section}.")] or settings)


def _written_keys(path: Keys, source: Source) -> Keys:
    """The keys as the user wrote them, without the kinds of unions that pydantic adds to its path."""
    if path[:-1] in source.places or path in source.places:
        return path
    for index in range(1, len(path) - 1):
        shorter = path[:index] + path[index + 1 :]
        if shorter in source.places or shorter[:-1] in source.places:
            return shorter
    return path


def _valid_keys(path: Keys) -> list[str]:
    """The names of the settings under pydantic's path of keys, which includes the kinds of unions."""
    model: type[BaseModel] = Experiment
    annotation: Any = Experiment
    for key in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[key].annotation if key in annotation.model_fields else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        else:  # the kind of a union
            annotation = next((kind for kind in settings_classes(annotation) if _kind(kind) == key), None)
        classes = settings_classes(annotation)
        if len(classes) == 1:
            annotation = classes[0]
            model = classes[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(model: type[BaseModel]) -> str:
    """The value of `kind` that selects this member of a union."""
    kind: str = get_args(model.model_fields["kind"].annotation)[0]
    return kind


def settings_classes(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in an annotation, which is one class or a union."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)]
