"""The generation config of a model that is written for other programs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from policies.files.base_model import load_generation_config

MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache")
"""Settings that others depend on."""


class ValidGeneration(NamedTuple):
    """A generation config that transformers saves.

    Attributes:
        config: The config.
        changes: What differs from the base model's, for people; empty where nothing had to change.
    """

    config: GenerationConfig
    changes: tuple[str, ...]


def valid_generation(path: str, ends: Iterable[int] = ()) -> ValidGeneration:
    """The generation config of a base model, changed as little as makes it valid.

    transformers loads a config with settings of sampling and without `do_sample`, but refuses to save it.

    Args:
        path: Folder or hub name of the base model.
        ends: Tokens that end a response, besides those of the config.

    Returns:
        The config with `do_sample: true` where it has settings of sampling and does not say whether to sample; without
        the settings that have no effect beside the others; and with all tokens that end a response.
    """
    given = load_generation_config(path)
    values = {name: getattr(given, name) for name in given.to_diff_dict() if hasattr(given, name)}
    values = {name: value for name, value in values.items() if not name.startswith("_")}
    config, dropped = _without_effect_dropped(values)
    changes: list[str] = []
    if dropped and given.do_sample is None:
        sampled, still_dropped = _without_effect_dropped(values | {"do_sample": True})
        sampling = [name for name in dropped if name not in still_dropped]
        if sampling:
            config = sampled
            dropped = still_dropped
            changes.append(f"`do_sample` is true, because {_list_of(sampling, values)} would have no effect without it")
    if dropped:
        changes.append(f"{_list_of(dropped, values)} left out: without effect beside the other settings")
    _add_ends(config, ends)
    return ValidGeneration(config, tuple(changes))


def write_generation_config(path: str, folder: Path, ends: Iterable[int] = ()) -> None:
    """Write the valid form of a base model's generation config to a folder; arguments as of `valid_generation`."""
    valid_generation(path, ends).config.save_pretrained(folder)


def _without_effect_dropped(values: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """A config of these values that transformers would save, and the names that it would not save."""
    config = GenerationConfig()
    dropped: list[str] = []
    for name in sorted(values, key=lambda name: (name not in MODES, name)):
        before = getattr(config, name, None)
        setattr(config, name, values[name])
        try:
            config.validate(strict=True)
        except ValueError:
            setattr(config, name, before)
            dropped.append(name)
    return config, dropped


def _add_ends(config: GenerationConfig, ends: Iterable[int]) -> None:
    """Add tokens to those that end a response; the config's own stay first."""
    configured = config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    merged = [token for token in dict.fromkeys([*ids, *sorted(ends)]) if token is not None]
    if merged:
        config.eos_token_id = merged if len(merged) > 1 else merged[0]


def _list_of(names: Iterable[str], values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}: {values[name]}`" for name in names)
