"""Explains to the user what pydantic finds wrong with an experiment."""

import difflib
import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from align.config.foreign_names import foreign_hint
from align.config.old_names import OLD_NAMES, OLD_VALUES
from align.config.overrides import OVERRIDE
from align.config.ppo_settings import USER_FUNCTION
from align.config.schema import Experiment
from align.config.source import Keys, Source
from policies.schema import UNREAD
from policies.text.columns import shown


def explain(problem: Any, source: Source) -> str:
    """Turn one of `ValidationError.errors()` into a message: file and line, key, and what would be valid."""
    path = tuple(str(key) for key in problem["loc"])
    keys = _written_keys(path, source)
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        keys = keys[:-1]
        return f"{source.place(keys)}: {'.'.join(keys)}: {PAIR}, not {_as_written(problem['input'])}"
    if problem["type"] == "missing":
        return f"{source.place(keys)}: {'.'.join(keys)} is missing"
    if problem["type"] == "extra_forbidden":
        hint = _hint(keys, problem["input"], _valid_keys(path[:-1]))
        return f"{source.place(keys)}: {'.'.join(keys)}: unknown key; {hint}"
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _explain_kind(problem["input"], path, keys, source)
    # After the key, pydantic names the member of a union that it tried: `policy.targets.str`.
    inner = keys
    while keys and keys not in source.places and keys[:-1] in source.places:
        keys = keys[:-1]
    where = f"{source.place(keys)}: {'.'.join(keys) or 'experiment'}"
    value = problem["input"]
    if new_value := _new_value(keys, value):
        return f"{where}: {value} has been renamed to {new_value}"
    # Messages go to logs, and a secret may be given by mistake as an address or as the name of a variable.
    is_secret = bool({"url", "key_env"} & set(keys))
    message = _in_words(problem, path, value, is_secret=is_secret)
    if inner != keys and problem["type"] in TEXT_OR_LIST:
        message = "expected text or a list of texts"
    if problem["type"] == UNREAD:
        return f"{where}: {message}{_how_to_remove(keys, problem['ctx']['names'], source)}"
    if override := _override_in(message, keys, source):
        where = f"{override}: {'.'.join(keys) or 'experiment'}"
    is_hidden = is_secret or isinstance(value, dict | BaseModel) or problem["type"] == USER_FUNCTION
    return f"{where}: {message}" if is_hidden else f"{where}: {message}, not {_as_written(value)}"


def _override_in(message: str, section: Keys, source: Source) -> str | None:
    """The override of the first setting within a section that a message names and that one has set; None without."""
    for word in re.findall(r"\w+(?:\.\w+)*", message):
        keys = (*section, *word.split("."))
        place = source.places.get(keys, "")
        # Without a section, a word alone could be prose, such as "model".
        if len(keys) > 1 and place.startswith(OVERRIDE):
            return place
    return None


def _how_to_remove(section: Keys, names: Sequence[str], source: Source) -> str:
    """How to remove from the command line what the file sets, where overrides leave it without effect."""
    places = {keys: place for keys, place in source.places.items() if keys[: len(section)] == section}
    if not any(place.startswith(OVERRIDE) for place in places.values()):
        return ""
    paths = [(*section, *name.split(".")) for name in names]
    removals = ["~" + ".".join(keys) for keys in paths if not places.get(keys, OVERRIDE).startswith(OVERRIDE)]
    return f"; on the command line: {' '.join(removals)}" if removals else ""


PAIR = "expected a list of two numbers, such as [0, 1]"
"""What is expected of every setting that is a tuple."""
PLAIN_ENGLISH = {
    "string_type": "expected text",
    "string_too_short": "expected text that is not empty",
    "string_pattern_mismatch": "expected letters, digits, `.`, `_` and `-`, the first one a letter or a digit",
    "int_type": "expected an integer",
    "int_parsing": "expected an integer",
    "int_from_float": "expected an integer",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "tuple_type": PAIR,
}
"""Pydantic's types of errors in the words of a user. The only setting with a pattern is `name`."""
TEXT_OR_LIST = ("string_type", "list_type")
"""The errors that pydantic gives, one each, for a setting that is neither text nor a list of texts."""
MAX_KEYS = 8
"""Largest number of keys that describe a section."""


def _in_words(problem: Any, path: Keys, value: object, is_secret: bool) -> str:
    """What is wrong with a value, without pydantic's terms."""
    kind = problem["type"]
    if kind in PLAIN_ENGLISH:
        return PLAIN_ENGLISH[kind]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a section{_contents(path)}"
    if kind == "list_type":
        is_example = isinstance(value, str) and not is_secret
        return f"expected a list, such as [{value}]" if is_example else "expected a list"
    if kind == "too_long" and problem["ctx"]["field_type"] == "Tuple":
        return PAIR
    if kind == "too_short" and problem["ctx"]["min_length"] == 1:
        return "expected at least one item"
    if kind == "literal_error":
        words = "a word: " if isinstance(value, bool) and "'" in problem["ctx"]["expected"] else ""
        return f"expected {words}{problem['ctx']['expected']}"
    message: str = problem["msg"].removeprefix("Value error, ")
    return message.replace("Input should be", "expected a number") if kind.startswith(("greater", "less")) else message


def _contents(path: Keys) -> str:
    """The keys of the section under a path, for `expected a section…`; empty where its keys are free."""
    annotation, _ = _annotation_at(path)
    classes = settings_classes(annotation)
    if not classes:
        return ""
    if len(classes) > 1:
        return f" with a kind: one of {_kinds(annotation)}"
    keys = _key_names(classes[0])
    more = ", …" if len(keys) > MAX_KEYS else ""
    return f" with keys {', '.join(keys[:MAX_KEYS])}{more}"


def _explain_kind(section: object, path: Keys, keys: Keys, source: Source) -> str:
    """The message about a section, such as a reward term, whose `kind` is missing or unknown."""
    annotation, _ = _annotation_at(path)
    kinds = _kinds(annotation)
    if not isinstance(section, dict) or "kind" not in section:
        return f"{source.place(keys)}: {'.'.join(keys)}: kind is missing; expected one of {kinds}"
    keys = (*keys, "kind")
    near = difflib.get_close_matches(str(section["kind"]), kinds.split(", "), n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    unknown = f"unknown kind {_as_written(section['kind'])}"
    return f"{source.place(keys)}: {'.'.join(keys)}: {unknown}; {guess}valid kinds: {kinds}"


def _as_written(value: object) -> str:
    """A value as in YAML, where Python's notation differs."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    # `Settings` gives pydantic the truth values as text where it expects a number.
    return value if isinstance(value, str) and value in ("true", "false") else shown(value)


def _hint(keys: Keys, value: object, valid: list[str]) -> str:
    """What to write instead of an unknown key."""
    key = ".".join(keys)
    if new_name := OLD_NAMES.get(key) or OLD_NAMES.get(".".join(_any_term(keys))):
        new_value = _new_value(keys, value)
        new_key = f"{'.'.join(keys[:-1])}.{new_name.rpartition('.')[2]}"
        return f"it has been renamed to {new_key}" + (f", and {value} to {new_value}" if new_value else "")
    if foreign := foreign_hint(keys):
        return foreign
    if near := difflib.get_close_matches(keys[-1], valid, n=1):
        return f"did you mean {near[0]}?"
    return f"valid keys: {', '.join(valid)}"


def _any_term(keys: Keys) -> Keys:
    """Replace the name of a reward term by `*`."""
    return (*keys[:2], "*", *keys[3:]) if keys[:2] == ("reward", "terms") else keys


def _new_value(keys: Keys, value: object) -> str | None:
    return OLD_VALUES.get((".".join(keys), value)) if isinstance(value, str) else None


def _written_keys(path: Keys, source: Source) -> Keys:
    """The keys as the user wrote them, without the kinds and members of unions that pydantic adds to its path."""
    # A kind may have the name of a setting, as in a term of kind `function`: only the types tell them apart.
    path = tuple(key for index, key in enumerate(path) if not _is_kind(path[:index]))
    if path[:-1] in source.places or path in source.places:
        return path
    for index in range(1, len(path) - 1):
        shorter = path[:index] + path[index + 1 :]
        if shorter in source.places or shorter[:-1] in source.places:
            return shorter
    return path


def _is_kind(path: Keys) -> bool:
    """Whether the key that follows this part of pydantic's path is the kind of a section."""
    annotation, _ = _annotation_at(path)
    return len(settings_classes(annotation)) > 1


def _valid_keys(path: Keys) -> list[str]:
    """The names of the settings under pydantic's path of keys, which includes the kinds of unions."""
    _, model = _annotation_at(path)
    return _key_names(model)


def _key_names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _annotation_at(path: Keys) -> tuple[Any, type[BaseModel]]:
    """The type of what pydantic's path of keys leads to, and the innermost settings class on the way."""
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
    return annotation, model


def _kinds(union: Any) -> str:
    """The kinds of a union of settings classes."""
    return ", ".join(sorted(_kind(model) for model in settings_classes(union)))


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
