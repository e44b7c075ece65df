"""Overrides of an experiment file, from the command line or from Python: `key=value`, `key:=value` and `~key`."""

import difflib
from collections.abc import Iterator
from typing import Any

import yaml

from align.config.source import MAX_DEPTH, Keys, Loader, Source
from policies.errors import UserError, first_line

OVERRIDE = "override "
"""What the place of a setting begins with where an override set it."""


def apply_override(source: Source, text: str) -> None:
    """Change the values of a source.

    Args:
        source: The values so far: those of the file, and of the overrides before this one.
        text: `key.path=value`, the value in YAML, merges a section into the one that is there and replaces anything
            else. `key.path:=value` replaces a section as well. `~key.path` removes a key, so that its default applies.

    Raises:
        UserError: The text has another form, or there is nothing to remove.
    """
    if text.startswith("~"):
        _remove(source, text)
        return
    path, separator, value = text.partition("=")
    replaces = path.endswith(":")
    keys = _keys(path.removesuffix(":"))
    where = _where(text)
    if not separator or not all(keys):
        raise UserError(f"{where}: expected key.path=value, such as ppo.kl.coefficient=0.1, or ~key.path")
    if not value.strip():
        sign = ":=" if replaces else "="
        raise UserError(f"{where}: nothing follows the `{sign}`: expected a value, or ~{'.'.join(keys)} to remove it")
    values = _parse(value, where)
    places = dict.fromkeys((*_sections_made(source, keys), keys, *_keys_within(values, keys)), where)
    for name in reversed(keys):
        values = {name: values}
    if replaces:
        source.forget(keys)
    source.merge(Source(source.file, values, places))


def is_override(text: str) -> bool:
    """Whether an argument has the form of an override, rather than that of a file name."""
    return "=" in text or text.startswith("~")


def _remove(source: Source, text: str) -> None:
    where = _where(text)
    path, separator, value = text.removeprefix("~").partition("=")
    keys = _keys(path)
    if not all(keys):
        raise UserError(f"{where}: expected ~key.path, such as ~policy.rank")
    if separator:
        raise UserError(f"{where}: write ~{path} to remove the key, or {path}={value} to set it")
    section: Any = source.values
    for depth, name in enumerate(keys):
        above = ".".join(keys[:depth])
        if not isinstance(section, dict):
            raise UserError(f"{where}: nothing to remove: {above} is not a section")
        if name not in section:
            raise UserError(f"{where}: nothing to remove: {_is_not_set(keys[: depth + 1], section)}")
        section = section[name]
    source.forget(keys)
    source.places[keys] = where


def _is_not_set(keys: Keys, section: dict[str, Any]) -> str:
    """The last key is not in the section, which has these other keys."""
    message = f"{'.'.join(keys)} is not set"
    above = keys[:-1]
    if near := difflib.get_close_matches(keys[-1], section, n=1):
        return f"{message}; did you mean {'.'.join((*above, near[0]))}?"
    place = f"under {'.'.join(above)}" if above else "in the file"
    return f"{message}; {place}: {', '.join(section) or 'nothing'}"


def _keys(path: str) -> Keys:
    return tuple(path.strip().split("."))


def _where(text: str) -> str:
    """The place of what an override sets, for messages. Raises UserError for one with too many keys."""
    path = text.partition("=")[0]
    if path.count(".") >= MAX_DEPTH:
        raise UserError(f"{OVERRIDE}{text[:80]!r}…: nested more than {MAX_DEPTH} deep")
    return f"{OVERRIDE}{text!r}"


def _parse(value: str, where: str) -> Any:
    try:
        return yaml.load(value, Loader=Loader)
    except yaml.YAMLError as error:
        cause = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}: the value is not valid YAML: {cause}") from None


def _sections_made(source: Source, keys: Keys) -> Iterator[Keys]:
    """The paths of the sections around a key that do not exist yet."""
    section: Any = source.values
    for depth, name in enumerate(keys[:-1], start=1):
        section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            yield keys[:depth]


def _keys_within(value: Any, above: Keys) -> Iterator[Keys]:
    """The paths of all keys in a value."""
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        keys = (*above, str(name))
        yield keys
        yield from _keys_within(inner, keys)
