"""Reads experiment files: YAML with `include:`, `${…}` and overrides, as validated settings."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from align.config.overrides import apply_override, is_override
from align.config.schema import Experiment
from align.config.source import FLOAT, Keys, Source, read_source
from align.config.validation_errors import explain
from align.runtime.atomic_files import write_text
from policies.errors import UserError, first_line
from rewards.http import SECRET


def load_experiment(path: Path | str, overrides: Sequence[str] = ()) -> Experiment:
    """Read the settings of an experiment file.

    Files under `include:`, whose paths are relative to the including file, are read first. The file itself overrides
    them, and `overrides` override both. `${key.path}` and `${oc.env:NAME}` are resolved last.

    Args:
        path: The YAML file.
        overrides: `key.path=value`, `key.path:=value` or `~key.path`, applied in this order; see `apply_override`.

    Returns:
        The validated settings.

    Raises:
        UserError: The settings are not valid; the message lists every problem with its file, line and key.
    """
    file = Path(path)
    if is_override(file.name) and not file.exists():
        raise UserError(f"{path}: the experiment file comes first, then the settings as KEY=VALUE")
    source = read_source(file)
    for override in overrides:
        apply_override(source, override)
    try:
        values = OmegaConf.to_container(OmegaConf.create(source.values), resolve=True)
    except OmegaConfBaseException as error:
        keys = tuple(str(error.full_key or "").split("."))
        raise UserError(f"{source.place(keys)}: {error.full_key or 'experiment'}: {first_line(error)}") from None
    except RecursionError:
        raise UserError(f"{path}: a setting refers to itself by ${{…}}") from None
    _refuse_invalid_text(values, (), source)
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        problems = dict.fromkeys(explain(problem, source) for problem in error.errors())
        raise UserError("\n".join(problems)) from None


NO_DEFAULT = object()


def _environment(name: str, default: Any = NO_DEFAULT) -> Any:
    """`${oc.env:NAME,default}`. Its value is written to `config.yaml` and sent to W&B, so it refuses secrets."""
    if SECRET.search(name):
        raise ValueError(
            f"{name} seems to hold a secret, which would be written to config.yaml and W&B: for the key of an "
            "endpoint, set key_env to the name of the variable"
        )
    if name not in os.environ and default is NO_DEFAULT:
        raise ValueError(f"the environment variable {name} is not set")
    return os.environ.get(name, default)


OmegaConf.register_resolver("oc.env", _environment, replace=True)


def dump_experiment(experiment: Experiment, path: Path) -> None:
    """Write all settings, defaults included, to a file that `load_experiment` can read."""
    text = yaml.dump(experiment.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_text(path, text)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that any reader of YAML could take for numbers or booleans, and escapes Unicode's line breaks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    has_line_break = any(character in text for character in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_line_break else None)


_Dumper.add_implicit_resolver(*FLOAT)
_Dumper.add_representer(str, _represent_text)


def _refuse_invalid_text(value: Any, keys: Keys, source: Source) -> None:
    """Raise UserError for text with characters that neither file names nor UTF-8 can hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_invalid_text(name, keys, source)
            _refuse_invalid_text(item, (*keys, str(name)), source)
    elif isinstance(value, list):
        for item in value:
            _refuse_invalid_text(item, keys, source)
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        raise UserError(
            f"{source.place(keys)}: {'.'.join(keys)}: {value!r} contains a character that is not allowed in text"
        )
