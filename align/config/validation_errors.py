"""What pydantic finds wrong with an experiment, in words for people."""

import difflib
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from align.config.schema import Experiment
from align.config.source import Keys, Source
from policies.text.columns import shown


def explain(problem: Any, source: Source) -> str:
    """One of `ValidationError.errors()`: file and line, key, and what would be right."""
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


def _written(path: Keys, source: Source) -> Keys:
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
