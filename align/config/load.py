"""Experiment files: YAML with `include:`, `${…}` and overrides, into settings that are known to be right."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from align.config.schema import Experiment
from align.config.source import Keys, Loader, Source, parse_override, read_source
from align.config.validation_errors import explain
from align.runtime.atomic_files import write_text
from policies.errors import UserError, first_line
from rewards.http import SECRET


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """The settings of an experiment file.

    Files that `include:` names, relative to the file that names them, come first; then the file itself; then the
    overrides, `key.path=value` with the value in YAML; then `${key.path}` and `${oc.env:NAME}` are put in.
    Raises UserError that lists every problem with its file, line and key.
    """
    source = read_source(Path(path))
    for override in overrides:
        source.merge(parse_override(override))
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
        problems = dict.fromkeys(explain(problem, source) for problem in error.errors())
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


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `Loader` would take for numbers."""


_Dumper.yaml_implicit_resolvers = Loader.yaml_implicit_resolvers


def _refuse_odd_text(value: Any, keys: Keys, source: Source) -> None:
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
