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
        named = " and ".join(target).split(" and ") if isinstance(target, tuple) else re.findall(r"`([\w.]+)`", target)
        assert set(named) - {"sft"} <= settings | {"sft"}, name


def test_no_foreign_name_is_a_setting_that_it_does_not_name() -> None:
    """Such a setting, misplaced, would get a message about another one."""
    by_last_part: dict[str, set[str]] = {}
    for setting in all_settings():
        by_last_part.setdefault(setting.rpartition(".")[2], set()).add(setting)
    assert not {name for name in FOREIGN_NAMES if "." in name} & all_settings()
    for name, target in FOREIGN_NAMES.items():
        for setting in by_last_part.get(name, ()):
            assert setting in target, (name, setting)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["ppo:", "  vf_coef: 0.1"], "exp.yaml:4: ppo.vf_coef: unknown key; align calls it ppo.critic.coefficient"),
        (["sft: {lr: 0.1}"], "exp.yaml:3: sft.lr: unknown key; align calls it sft.learning_rate"),
        (["reward: {max_length: 9}"], "exp.yaml:3: reward.max_length: unknown key; align calls it reward.max_tokens"),
        (["cliprange: 0.1"], "exp.yaml:3: cliprange: unknown key; align calls it ppo.clip_low and ppo.clip_high"),
        (
            ["ppo: {mini_batch_size: 4}"],
            "exp.yaml:3: ppo.mini_batch_size: unknown key; set the number of minibatches per epoch, `ppo.minibatches`",
        ),
    ],
)
def test_the_name_of_another_library_is_translated(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert problem(tmp_path, *lines) == expected


BOTH_CLIPS = "align calls it ppo.clip_low and ppo.clip_high"
BOTH_RATES = "align calls it learner.policy_learning_rate and learner.critic_learning_rate"
CRITIC_COEFFICIENT = "align calls it ppo.critic.coefficient"
MICROBATCH = "a microbatch is measured in tokens: set `learner.tokens_per_microbatch`"
FITTED_RATES = "sft.learning_rate, or classify.learning_rate, or reward.learning_rate, or dpo.learning_rate"
STAGES = "settings of each stage: `sft`, `classify`, `reward`, `dpo`, `ppo`, `learner`"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("ppo.critic.lr", "align calls it learner.critic_learning_rate"),
        ("ppo.critic.learning_rate", "align calls it learner.critic_learning_rate"),
        ("ppo.lr", BOTH_RATES),
        ("ppo.learning_rate", BOTH_RATES),
        ("learner.lr", BOTH_RATES),
        ("policy.lr", BOTH_RATES),
        ("reward.lr", "align calls it reward.learning_rate"),
        ("lr", f"{BOTH_RATES}, or {FITTED_RATES}"),
        ("rollouts.max_length", "align calls it rollouts.max_new_tokens and rollouts.max_prompt_tokens"),
        ("ppo.max_length", "align calls it rollouts.max_new_tokens and rollouts.max_prompt_tokens"),
        ("sft.max_steps", "align calls it sft.epochs"),
        ("sft.steps", "align calls it sft.epochs"),
        ("reward.max_steps", "align calls it reward.epochs"),
        ("ppo.max_steps", "align calls it ppo.steps"),
        ("trainer", STAGES),
        ("training", STAGES),
        ("generation", "align calls it rollouts"),
        ("algorithm", "align calls it ppo"),
        ("actor", "settings of the policy: `policy` (adapter), `learner` (optimizer) and `ppo` (loss)"),
        (
            "actor_rollout_ref",
            "in align these are sections of their own: `model`, `policy`, `rollouts`, `learner`, `ppo`",
        ),
        ("critic", "settings of the critic: `ppo.critic` and `learner.critic_learning_rate`"),
        ("wandb", "align calls it tracking.wandb"),
        ("ppo.advantage", "align calls it ppo.estimator"),
        (
            "ppo.scale_rewards",
            "the estimator grpo always divides by the standard deviation of a prompt's rewards",
        ),
        ("ppo.clip", BOTH_CLIPS),
        ("ppo.clip_range", BOTH_CLIPS),
        ("ppo.clip_eps", BOTH_CLIPS),
        ("ppo.clip_epsilon", BOTH_CLIPS),
        ("ppo.cliprange", BOTH_CLIPS),
        ("ppo.eps_clip", BOTH_CLIPS),
        ("ppo.clip_ratio", BOTH_CLIPS),
        ("rollouts.n", "align calls it ppo.samples_per_prompt"),
        ("ppo.ent_coef", "align calls it ppo.entropy_coefficient"),
        ("ppo.entropy_coeff", "align calls it ppo.entropy_coefficient"),
        ("ppo.value_loss_coef", CRITIC_COEFFICIENT),
        ("ppo.vf_coeff", CRITIC_COEFFICIENT),
        ("ppo.value_coef", CRITIC_COEFFICIENT),
        ("ppo.critic.coef", CRITIC_COEFFICIENT),
        ("ppo.local_rollout_forward_batch_size", MICROBATCH),
        ("ppo.kl.coef", "align calls it ppo.kl.coefficient"),
        ("ppo.kl.type", "align calls it ppo.kl.estimator"),
        ("reward.center_rewards_coefficient", "align calls it reward.centering"),
        ("ppo.optimizer", "align calls it learner.optimizer"),
        ("output_dir", "align calls it runs and name"),
    ],
)
def test_a_translation_fits_the_section_of_the_key(tmp_path: Path, key: str, expected: str) -> None:
    line = "{" + key.replace(".", ": {") + ": 1" + "}" * (key.count(".") + 1)
    assert problem(tmp_path, line.removeprefix("{").removesuffix("}")) == f"exp.yaml:3: {key}: unknown key; {expected}"


KINDS = ", ".join(sorted(TERMS))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "reward: {terms: {a: {kind: lenght}}}",
            f"reward.terms.a.kind: unknown kind 'lenght'; did you mean length? valid kinds: {KINDS}",
        ),
        ("reward: {terms: {a: {kind: 3}}}", f"reward.terms.a.kind: unknown kind 3; valid kinds: {KINDS}"),
        ("reward: {terms: {a: {weight: 1}}}", f"reward.terms.a: kind is missing; expected one of {KINDS}"),
        ("reward: {terms: {a: 3}}", f"reward.terms.a: expected a section with a kind: one of {KINDS}, not 3"),
        ("reward: {terms: []}", "reward.terms: expected a section, not []"),
        (
            "ppo: {kl: 0.05}",
            "ppo.kl: expected a section with keys where, estimator, coefficient, target, horizon, not 0.05",
        ),
        (
            "evaluation:",
            "evaluation: expected a section with keys prompts, every, best, gold, temperature, prompt_styles, judge, "
            "best_of, …, not null",
        ),
        ("stages: []", "stages: expected at least one item, not []"),
        ("stages: ppo", "stages: expected a list, such as [ppo], not 'ppo'"),
        ("rollouts: {stop: ['']}", "rollouts.stop: expected text that is not empty, not ''"),
        ("policy: {targets: 3}", "policy.targets: expected text or a list of texts, not 3"),
        (
            "tracking: {wandb: true}",
            "tracking.wandb: expected a word: 'auto', 'online', 'offline' or 'disabled', not true",
        ),
        ("runs: 3", "runs: expected text, not 3"),
        ("deterministic: 3", "deterministic: expected true or false, not 3"),
        ("ppo: {steps: 0}", "ppo.steps: expected a number greater than or equal to 1, not 0"),
        ("learner: {ranks: true}", "learner.ranks: expected an integer, not true"),
        ("learner: {tokens_per_microbatch: true}", "learner.tokens_per_microbatch: expected an integer, not true"),
        ("learner: {zero: false}", "learner.zero: expected 0, 1, 2 or 3, not false"),
        ("sft: {learning_rate: true}", "sft.learning_rate: expected a number, not true"),
        ("learner: {ranks: 1.5}", "learner.ranks: expected an integer, not 1.5"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_in_plain_english(tmp_path: Path, line: str, expected: str) -> None:
    assert problem(tmp_path, line) == f"exp.yaml:3: {expected}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("timeout: -1", "timeout: expected a number greater than 0, not -1"),
        ("weight: x", "weight: expected a number, not 'x'"),
        ("timout: 3", "timout: unknown key; did you mean timeout?"),
        ("clip: 3", "clip: expected a list of two numbers, such as [0, 1], not 3"),
        ("clip: [1]", "clip: expected a list of two numbers, such as [0, 1], not [1]"),
        ("clip: [1, 2, 3]", "clip: expected a list of two numbers, such as [0, 1], not [1, 2, 3]"),
        ("clip: [a, 2]", "clip: expected a number, not 'a'"),
    ],
)
def test_a_wrong_value_in_a_term_is_told_from_the_setting_that_its_kind_is_named_like(
    tmp_path: Path, line: str, expected: str
) -> None:
    term = ["reward:", "  terms:", "    m:", "      kind: function", "      function: 'f.py:f'"]
    assert problem(tmp_path, *term, f"      {line}") == f"exp.yaml:8: reward.terms.m.{expected}"


def test_an_invalid_name_says_which_characters_are_valid(tmp_path: Path) -> None:
    (tmp_path / "exp.yaml").write_text("name: a b\nmodel: {path: m}\n")
    with pytest.raises(
        UserError, match=r"exp\.yaml:1: name: expected letters, digits, `\.`, `_` and `-`, the first one"
    ):
        load_experiment(tmp_path / "exp.yaml")


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pppo.steps=3", "pppo: unknown key; did you mean ppo?"),
        ("evaluation.golden.path=x", "evaluation.golden: unknown key; did you mean gold?"),
        ("reward.terms.n.weight=3", f"reward.terms.n: kind is missing; expected one of {KINDS}"),
        (
            "reward.constraint={term: x, at_most: 1}",
            "reward: constraint.term: unknown term 'x'; the terms are m",
        ),
        ("ppo.batch_size=10", "ppo: minibatches 4 does not divide batch_size 10"),
        ("ppo.minibatches=5", "ppo: minibatches 5 does not divide batch_size 8"),
    ],
)
def test_what_an_override_gets_wrong_is_not_blamed_on_the_file(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text(
        "name: x\nmodel: {path: m}\nreward: {terms: {m: {kind: model}}}\nppo: {batch_size: 8, minibatches: 4}\n"
    )
    with pytest.raises(UserError) as caught:
        load_experiment(path, [override])
    assert str(caught.value) == f"override {override!r}: {expected}"


def test_a_section_that_the_file_takes_from_an_anchor_is_not_blamed_on_an_override(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_text("name: x\nmodel: {path: m}\nppo: {<<: {kll: {where: reward}}}\n")
    with pytest.raises(UserError, match=rf"^{path}:3: ppo\.kll: unknown key"):
        load_experiment(path, ["ppo.kll.target=3"])
