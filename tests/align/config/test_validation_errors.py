"""Messages about unknown keys, and the tables of other names that they come from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from align.config.foreign_names import FOREIGN_NAMES
from align.config.load import load_experiment
from align.config.old_names import OLD_NAMES, OLD_VALUES
from align.config.schema import Experiment
from align.config.validation_errors import settings_classes
from policies.errors import UserError
from rewards.terms.registry import TERMS


def settings_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted names of all settings and sections under a settings class."""
    for name, field in model.model_fields.items():
        yield above + name
        for inner in settings_classes(field.annotation):
            yield from settings_of(inner, f"{above}{name}.")


def all_settings() -> set[str]:
    names = set(settings_of(Experiment))
    for term in TERMS.values():
        names.update(settings_of(term, "reward.terms.*."))
    return names


def problem(folder: Path, *lines: str) -> str:
    """The message about a file with a valid head and these lines, the first of which is line 3."""
    path = folder / "exp.yaml"
    path.write_text("\n".join(["name: x", "model: {path: m}", *lines]) + "\n")
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    return str(caught.value).removeprefix(f"{folder}/")


def test_every_new_name_is_a_setting_and_no_old_name_is() -> None:
    settings = all_settings()
    assert set(OLD_NAMES.values()) <= settings
    assert not set(OLD_NAMES) & settings


def test_every_new_value_is_valid(tmp_path: Path) -> None:
    for (key, old), new in OLD_VALUES.items():
        assert old != new
        settings: dict[str, Any] = {"name": "x", "model": {"path": "m"}}
        inner = settings
        *sections, name = OLD_NAMES.get(key, key).split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = new
        if name == "combine":
            inner["members"] = 2
        Experiment.model_validate(settings)


def test_every_foreign_name_leads_to_settings() -> None:
    settings = all_settings()
    for name, target in FOREIGN_NAMES.items():
        named = target if isinstance(target, tuple) else re.findall(r"`([\w.]+)`", target)
        assert set(named) - {"sft"} <= settings | {"sft"}, name


def test_no_foreign_name_is_a_setting_that_it_does_not_name() -> None:
    """Such a setting, misplaced, would get a message about another one."""
    by_last_part: dict[str, set[str]] = {}
    for setting in all_settings():
        by_last_part.setdefault(setting.rpartition(".")[2], set()).add(setting)
    for name, target in FOREIGN_NAMES.items():
        for setting in by_last_part.get(name, ()):
            assert setting in target, (name, setting)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["ppo:", "  vf_coef: 0.1"], "exp.yaml:4: ppo.vf_coef: unknown key; align calls it ppo.critic.coefficient"),
        (["sft: {lr: 0.1}"], "exp.yaml:3: sft.lr: unknown key; align calls it sft.learning_rate"),
        (["reward: {max_length: 9}"], "exp.yaml:3: reward.max_length: unknown key; align calls it reward.max_tokens"),
        (["cliprange: 0.1"], "exp.yaml:3: cliprange: unknown key; align calls it ppo.clip_low or ppo.clip_high"),
        (
            ["ppo: {mini_batch_size: 4}"],
            "exp.yaml:3: ppo.mini_batch_size: unknown key; set the number of minibatches per epoch, `ppo.minibatches`",
        ),
    ],
)
def test_the_name_of_another_library_is_translated(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert problem(tmp_path, *lines) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["ppo:", "  batch: 8"], "exp.yaml:4: ppo.batch: unknown key; it has been renamed to ppo.batch_size"),
        (
            ["ppo: {average: tokens}"],
            "exp.yaml:3: ppo.average: unknown key; it has been renamed to ppo.loss_aggregation, and tokens to "
            "token_mean",
        ),
        (
            ["reward: {terms: {short: {kind: length, max_tokens: 9, most: 5}}}"],
            "exp.yaml:3: reward.terms.short.most: unknown key; it has been renamed to reward.terms.short.max_tokens",
        ),
        (
            ["reward: {ensemble: {members: 2, combine: mean_less_deviation}}"],
            "exp.yaml:3: reward.ensemble.combine: mean_less_deviation has been renamed to mean_minus_std",
        ),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert problem(tmp_path, *lines) == expected
