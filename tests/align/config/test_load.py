from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from align.config.load import dump_experiment, load_experiment
from align.config.schema import Experiment
from align.config.stage import stage_names
from policies.errors import UserError
from policies.schema import PolicySettings
from rewards.terms.json_schema import JsonTerm

MINIMAL = "name: x\nmodel: {path: m}\n"


def write(folder: Path, text: str, name: str = "experiment.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(write(folder, text), overrides)
    return str(caught.value)


def test_reads_settings_and_defaults(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL + "ppo:\n  steps: 7\ndata: {prompts: p.jsonl}\n"))
    assert (experiment.ppo.steps, experiment.ppo.epochs) == (7, 2)
    assert experiment.data.prompts is not None
    assert experiment.data.prompts.path == "p.jsonl"


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".1e-3"])
def test_floats_as_people_write_them(tmp_path: Path, number: str) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL + f"learner: {{policy_learning_rate: {number}}}"))
    assert experiment.learner.policy_learning_rate == 1e-4


def test_overrides_win_and_are_put_into_interpolations(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "data: {prompts: 'runs/${name}/p-${seed}.jsonl'}\n")
    experiment = load_experiment(path, ["name=other", "seed=3", "ppo.kl.coefficient=1e-3"])
    assert experiment.data.prompts is not None
    assert experiment.data.prompts.path == "runs/other/p-3.jsonl"
    assert experiment.ppo.kl.coefficient == 1e-3


def test_the_file_wins_over_what_it_includes_and_a_later_include_over_an_earlier(tmp_path: Path) -> None:
    write(tmp_path, "ppo: {steps: 1, epochs: 1, batch_size: 4}\n", "one.yaml")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", "include: ../deep.yaml\nppo: {epochs: 3}\n", "two.yaml")
    write(tmp_path, "ppo: {epochs: 9, gamma: 0.5}\n", "deep.yaml")
    experiment = load_experiment(
        write(tmp_path, "include: [one.yaml, parts/two.yaml]\n" + MINIMAL + "ppo: {batch_size: 8}\n")
    )
    ppo = experiment.ppo
    assert (ppo.steps, ppo.epochs, ppo.batch_size, ppo.gamma) == (1, 3, 8, 0.5)


def test_an_unknown_key_is_named_with_line_and_nearest_key(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL + "ppo:\n  kl:\n    coeficient: 0.1\n")
    assert "experiment.yaml:5: ppo.kl.coeficient: unknown key; did you mean coefficient?" in message


def test_a_key_unlike_any_other_lists_the_valid_ones(tmp_path: Path) -> None:
    assert "valid keys: where, estimator" in problem(tmp_path, MINIMAL + "ppo: {kl: {zzz: 1}}\n")


def test_an_unknown_key_of_a_data_source(tmp_path: Path) -> None:
    assert "did you mean limit?" in problem(tmp_path, MINIMAL + "data: {prompts: {path: p, limits: 1}}\n")


def test_an_unknown_key_of_an_include_names_that_file(tmp_path: Path) -> None:
    write(tmp_path, "ppo:\n  step: 1\n", "part.yaml")
    assert "part.yaml:2: ppo.step" in problem(tmp_path, "include: part.yaml\n" + MINIMAL)


def test_all_problems_are_listed(tmp_path: Path) -> None:
    message = problem(tmp_path, "nam: x\nmodel: {}\nppo: {epochs: 0, gamma: nan}\n", "learner.zero=7")
    expected = (
        "nam: unknown key",
        "name is missing",
        "model.path is missing",
        "ppo.epochs",
        "ppo.gamma",
        "learner.zero=7",
    )
    assert all(part in message for part in expected), message


def test_an_unknown_stage_is_told_the_stages(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL + "stages: [sft, pp]\n")
    assert message == f"{tmp_path}/experiment.yaml:3: stages: expected one of {', '.join(stage_names())}, not 'pp'"


def test_a_rule_across_keys_is_explained(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL + "ppo:\n  batch_size: 10\n  minibatches: 4\n")
    assert message == f"{tmp_path}/experiment.yaml:3: ppo: minibatches 4 does not divide batch_size 10"


def test_a_union_is_named_by_its_key(tmp_path: Path) -> None:
    message = problem(tmp_path, MINIMAL + "policy: {targets: 3}\n")
    assert "policy.targets: " in message
    assert ".str" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "expected lines of the form `key: value`"),
        ("name: x\nmodel: {path: m\n", "not valid YAML"),
        ("name: x\nname: y\n", ":2: name is set twice, first on line 1"),
        (MINIMAL + "ppo:\n  steps: 1\n  steps: 2\n", ":5: ppo.steps is set twice"),
        (MINIMAL + "include: nowhere.yaml\n", "experiment.yaml:3: include: "),
        (MINIMAL + "include: nowhere.yaml\n", "nowhere.yaml does not exist"),
        (MINIMAL + "null: 3\n", "experiment.yaml:3: null: expected text as a key: put it in quotes"),
        (MINIMAL + "ppo:\n  1: 2\n", "experiment.yaml:4: ppo.1: expected text as a key: put it in quotes"),
        (MINIMAL + "include: experiment.yaml\n", "includes itself"),
        (MINIMAL + "include: {a: b}\n", "a file name or a list"),
        (MINIMAL + "runs: ${nothing}\n", "experiment.yaml:3: runs: "),
        (MINIMAL + "name2: &a [*b]\n", "not valid YAML"),
        ("name: '../x'\nmodel: {path: m}\n", "name: "),
        (MINIMAL + "learner: {schedule: cosin}\n", ":3: learner.schedule: expected 'constant', 'linear'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("ppo: {estimator: rloo}", "ppo: rloo compares the samples of a prompt: set samples_per_prompt to 2 or more"),
        ("ppo: {samples_per_prompt: 3}", "ppo: samples_per_prompt 3 does not divide batch_size 128"),
        (
            "ppo: {estimator: reinforce++, on_truncation: bootstrap}",
            "`on_truncation: bootstrap` needs a critic, and reinforce++ has none",
        ),
        (
            "ppo: {critic: {model: m}}",
            "ppo.critic: `model` is the base of a critic of kind `model`, and kind is",
        ),
        (
            "rollouts: {max_staleness: 1}",
            "max_staleness: rollouts run in parallel with the learner only in workers: set workers",
        ),
        (
            "deterministic: true\nppo: {importance_ratio_cap: 2}\n"
            "rollouts: {max_staleness: 1, segment_tokens: 8, workers: 2}",
            "deterministic: no two runs are the same with rollouts.segment_tokens",
        ),
        ("rollouts: {segment_tokens: 8}", "newer weights only while the learner trains: set max_staleness"),
        (
            "rollouts: {max_staleness: 1, segment_tokens: 8, workers: 2, engine: vllm, stop: [x]}",
            "vllm would miss a stop string that begins before a segment ends",
        ),
        (
            "rollouts: {max_staleness: 1, workers: 2}",
            "which ppo.importance_ratio_cap corrects for: set it; 2.0 is usual",
        ),
        (
            "rollouts: {max_staleness: 1, workers: 2}\nppo: {importance_ratio_cap: 2, max_mismatch: 1}",
            "ppo.max_mismatch compares sampler and learner under the same weights, and rollouts.max_staleness lets "
            "them differ: remove one of the two",
        ),
        (
            "rollouts: {workers: 3}",
            "a batch of 128 is 2 chunks of 64 prompts, and some workers would be idle: set roll",
        ),
        ("rollouts: {engine: vllm}", "engine vllm runs only in workers: set workers to 1"),
        ("rollouts: {vllm: {seed: 1}}", "`vllm` has no effect with engine transformers: remove it"),
        ("rollouts: {engine: vllm, workers: 1}\npolicy: {method: ia3}", "adapters of policy.method lora without dora"),
        ("rollouts: {engine: vllm, workers: 1}\npolicy: {dora: true}", "this policy is another: use engine transf"),
        (
            "ppo: {estimator: rloo, samples_per_prompt: 2, gamma: 0.9}",
            "ppo: rloo does not read gamma: remove it, or use gae or",
        ),
        (
            "ppo: {estimator: reinforce++, gae_lambda: 0.9}",
            "ppo: reinforce++ does not read gae_lambda: remove it, or use gae",
        ),
        ("reward: {terms: {a: {kind: regex}}}", "reward.terms.a.pattern is missing"),
        (
            "reward: {terms: {a: {kind: regex, pattern: x, full_mach: true}}}",
            "reward.terms.a.full_mach: unknown key; did you mean full_match",
        ),
        (
            "reward: {terms: {a: {kind: regexp, pattern: x}}}",
            "reward.terms.a.kind: unknown kind 'regexp'; did you mean regex?",
        ),
        (
            "reward: {terms: {a: {kind: exact}}, constraint: {term: b, at_most: 1}}",
            "constraint.term: unknown term 'b'; the terms are a",
        ),
        (
            "reward: {ensemble: {combine: minimum}}",
            "reward: ensemble.combine `minimum` needs ensemble.members of 2 or more",
        ),
        ("reward: {patience: 2}", "reward: patience counts evaluations of the held-out loss: set evaluate_every too"),
        ("reward: {classifier: x, attributes: {a: 1}}", "reward: `attributes` has no effect with `classifier`"),
        ("reward: {terms: {a: {kind: exact}}, model: x}", "reward: terms: none is of kind `model`"),
        ("ppo: {stop: {metric: reward/spread}}", "ppo.stop: set at least one of above, below and falls_by"),
        ("ppo: {estimator: reinforce++, critic: {warmup: 3}}", "ppo: reinforce++ has no critic: remove `critic`"),
        ("policy: {method: full}", "model.dtype bfloat16 is too coarse"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, settings: str, expected: str) -> None:
    coarse = MINIMAL.replace("path: m", "path: m, dtype: bfloat16") if "full" in settings else MINIMAL
    assert expected in problem(tmp_path, f"{coarse}{settings}\n")


@pytest.mark.parametrize("override", ["ppo.steps", "=3", "ppo..steps=1", "ppo.steps=[1", "ppo.steps=", "seed= "])
def test_mistakes_in_an_override(tmp_path: Path, override: str) -> None:
    message = problem(tmp_path, MINIMAL, override)
    assert message.startswith(f"override {override!r}: ")
    assert "\n" not in message


LORA = MINIMAL + "policy:\n  rank: 8\n  alpha: 16\n"


def test_an_override_removes_a_key(tmp_path: Path) -> None:
    policy = load_experiment(write(tmp_path, LORA), ["policy.method=ia3", "~policy.rank", "~policy.alpha"]).policy
    assert policy == PolicySettings(method="ia3")


def test_an_override_removes_a_section(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, LORA), ["~policy"]).policy == PolicySettings()


def test_an_override_replaces_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, LORA)
    assert load_experiment(path, ["policy:={method: ia3}"]).policy == PolicySettings(method="ia3")
    assert load_experiment(path, ["policy={rank: 4}"]).policy == PolicySettings(rank=4, alpha=16)
    assert load_experiment(path, ["policy:={rank: 4}"]).policy == PolicySettings(rank=4)


def test_overrides_apply_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, LORA)
    assert load_experiment(path, ["policy.rank=4", "~policy.rank"]).policy.rank == PolicySettings().rank
    assert load_experiment(path, ["~policy.rank", "policy.rank=4"]).policy.rank == 4


def test_a_key_of_an_included_file_is_removed(tmp_path: Path) -> None:
    write(tmp_path, "policy: {rank: 8}\n", "part.yaml")
    assert load_experiment(write(tmp_path, "include: part.yaml\n" + MINIMAL), ["~policy.rank"]).policy.rank == 16


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("~policy.rnk", "nothing to remove: policy.rnk is not set; did you mean policy.rank?"),
        ("~policy.dora", "nothing to remove: policy.dora is not set; under policy: rank, alpha"),
        ("~ppo.kl", "nothing to remove: ppo is not set"),
        ("~name.first", "nothing to remove: name is not a section"),
        ("~policy.rank=8", "write ~policy.rank to remove the key, or policy.rank=8 to set it"),
        ("~", "expected ~key.path, such as ~policy.rank"),
        ("~policy..rank", "expected ~key.path, such as ~policy.rank"),
        ("~model", "model is missing"),
        ("~model.path", "model.path is missing"),
        ("policy:=", "nothing follows the `:=`"),
        ("policy:={rnk: 8}", "policy.rnk: unknown key; did you mean rank?"),
        ("policy:=[", "the value is not valid YAML"),
    ],
)
def test_mistakes_in_removing_and_replacing(tmp_path: Path, override: str, expected: str) -> None:
    message = problem(tmp_path, LORA, override)
    assert message.startswith(f"override {override!r}: ")
    assert expected in message


def test_a_line_of_what_an_override_removed_is_not_named_again(tmp_path: Path) -> None:
    message = problem(tmp_path, LORA, "policy:={method: lora, lora_plus: 0}", "~policy.method")
    assert message.startswith("override 'policy:={method: lora, lora_plus: 0}': policy.lora_plus: ")


def test_what_the_file_sets_in_vain_is_listed_with_how_to_remove_it(tmp_path: Path) -> None:
    message = problem(tmp_path, LORA, "policy.method=ia3")
    assert message.endswith(
        "policy: method ia3 does not read alpha and rank, which are for adalora or loha or lokr or lora or qlora or "
        "vera: remove them; on the command line: ~policy.alpha ~policy.rank"
    )
    assert "~policy.rank" not in problem(tmp_path, LORA + "  method: ia3\n")
    assert "~policy.rank" not in problem(tmp_path, MINIMAL, "policy.method=ia3", "policy.rank=4")


@pytest.mark.parametrize(
    ("file", "override", "hint"),
    [
        ("ppo: {gamma: 0.9, gae_lambda: 0.9}", "ppo.estimator=reinforce++", "~ppo.gae_lambda"),
        ("ppo: {critic: {warmup: 3}}", "ppo.estimator=reinforce++", "~ppo.critic"),
        ("rollouts: {engine: vllm, workers: 1, vllm: {a: 1}}", "rollouts.engine=transformers", "~rollouts.vllm"),
        ("reward: {attributes: {a: 1}}", "reward.classifier=m", "~reward.attributes"),
        ("reward: {ensemble: {members: 3}}", "reward.classifier=m", "~reward.ensemble"),
        (
            "reward: {ensemble: {members: 3, combine: mean_minus_std, penalty: 1}}",
            "reward.ensemble.combine=mean",
            "~reward.ensemble.penalty",
        ),
        ("policy: {init: pissa}", "policy.dora=true", "~policy.init"),
        ("reward: {model: m}", "reward.terms:={a: {kind: exact}}", "~reward.model"),
    ],
)
def test_every_setting_that_an_override_leaves_without_effect_can_be_removed(
    tmp_path: Path, file: str, override: str, hint: str
) -> None:
    text = f"{MINIMAL}{file}\n"
    assert problem(tmp_path, text, override).endswith(f"; on the command line: {hint}")
    load_experiment(write(tmp_path, text), [override, hint])


BOOLEAN_WORDS = ["no", "No", "off", "OFF", "yes", "Yes", "on", "ON"]
"""What YAML 1.1 reads as false and true."""


@pytest.mark.parametrize("value", ["no", "'no'", "false", '"no"'])
def test_a_word_that_yaml_reads_as_a_boolean(tmp_path: Path, value: str) -> None:
    text = f"{MINIMAL}reward: {{terms: {{model: {{kind: model, normalise: {value}}}}}}}\n"
    assert load_experiment(write(tmp_path, text)).reward.terms["model"].normalise == "no"
    overrides = [f"reward.terms.model={{kind: model, normalise: {value}}}"]
    assert load_experiment(write(tmp_path, MINIMAL), overrides).reward.terms["model"].normalise == "no"


@pytest.mark.parametrize("word", BOOLEAN_WORDS)
def test_boolean_words_are_text_where_text_is_expected(tmp_path: Path, word: str) -> None:
    text = (
        f"rollouts: {{stop: [{word}]}}\ndata: {{prompts: {{path: p, columns: {{prompt: {word}}}}}}}\n"
        f"evaluation: {{prompt_styles: {{{word}: {{system: {word}}}}}}}\n"
        f"reward: {{terms: {{{word}: {{kind: json, schema: {{enum: [{word}, true]}}}}}}}}\n"
    )
    experiment = load_experiment(write(tmp_path, MINIMAL + text))
    assert experiment.rollouts.stop == [word]
    assert experiment.data.prompts is not None
    assert experiment.data.prompts.columns == {"prompt": word}
    assert experiment.evaluation.prompt_styles[word].system == word
    term = experiment.reward.terms[word]
    assert isinstance(term, JsonTerm)
    assert term.schema_ == {"enum": [word, True]}
    path = tmp_path / "config.yaml"
    dump_experiment(experiment, path)
    assert load_experiment(path) == experiment
    dumped = yaml.safe_load(path.read_text())
    assert dumped["rollouts"]["stop"] == [word], "any reader of YAML 1.1 takes it as text"


@pytest.mark.parametrize("word", BOOLEAN_WORDS)
def test_boolean_words_are_booleans_where_one_is_expected(tmp_path: Path, word: str) -> None:
    text = f"{MINIMAL}deterministic: {word}\npolicy: {{dora: {word}}}\n"
    experiment = load_experiment(write(tmp_path, text))
    expected = word.lower() in ("yes", "on")
    assert experiment.deterministic is experiment.policy.dora is expected
    assert "ppo.steps: expected an integer, not" in problem(tmp_path, f"{text}ppo: {{steps: {word}}}\n")


@pytest.mark.parametrize("word", BOOLEAN_WORDS)
def test_boolean_words_among_the_arguments_of_vllm_are_refused(tmp_path: Path, word: str) -> None:
    """They would reach vLLM as text, which is true in Python."""
    text = f"{MINIMAL}rollouts: {{engine: vllm, workers: 1, vllm: {{enforce_eager: {word}}}}}\n"
    assert "enforce_eager: expected true or false" in problem(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_experiment(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("runs", ["a\x85b", "\u2028", "é\u2029", "plain", "1e-4"])
def test_line_breaks_of_unicode_and_numbers_in_text_are_dumped_as_they_are(tmp_path: Path, runs: str) -> None:
    experiment = Experiment.model_validate({"name": "x", "model": {"path": "m"}, "runs": runs})
    dump_experiment(experiment, tmp_path / "config.yaml")
    assert load_experiment(tmp_path / "config.yaml").runs == runs


@given(
    values=st.fixed_dictionaries(
        {
            "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True),
            "seed": st.integers(0, 2**40),
            "runs": st.text(st.characters(codec="utf-8", exclude_characters="${}\\\0"), min_size=1),
            "ppo": st.fixed_dictionaries(
                {"gamma": st.floats(1e-9, 1), "target_kl": st.none() | st.floats(1e-12, 1e12)}
            ),
        }
    )
)
def test_what_is_dumped_loads_as_the_same(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    experiment = Experiment.model_validate(values | {"model": {"path": "1e5"}})
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    dump_experiment(experiment, path)
    assert load_experiment(path) == experiment


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["policy.method=lore"], "policy.method"),
        (["policy.rank=0"], "policy.rank"),
        (
            ["policy.method=ia3", "policy.rank=4"],
            "method ia3 does not read rank, which is for adalora or loha or lokr or lora or qlora or vera: remove it",
        ),
        (["policy.method=bitfit", "model.dtype=bfloat16"], "too coarse for: use float32"),
        (["policy.method=qlora", "learner.zero=3"], "use learner.zero 0, 1 or 2"),
        (["policy.dora=true", "learner.zero=3"], "lora without dora"),
        (["policy.method=qlora", "sft.zero=3"], "use sft.zero 0, 1 or 2"),
        (["policy.method=qlora", "reward.zero=3"], "use reward.zero 0, 1 or 2"),
        (["policy.method=adalora", "learner.zero=1"], "shards the gradients"),
        (["policy.method=adalora", "stages=[ppo]"], "distributes its ranks over the layers in SFT: add sft to stages"),
        (["policy.method=adamix", "stages=[reward]"], "mixes adapters in SFT"),
        (["policy.method=adalora", "sft.evaluate_every=2"], "has more ranks at earlier steps of SFT"),
        (["policy.method=prefix_tuning", "model.gradient_checkpointing=true"], "use policy.method prompt_tuning"),
        (["policy.init=pissa", "learner.weight_decay=0.1"], "set learner.weight_decay to 0"),
    ],
)
def test_methods_that_do_not_go_with_a_setting_say_what_does(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    assert expected in problem(tmp_path, MINIMAL, *overrides)


@pytest.mark.parametrize("method", ["adamix", "lora", "bottleneck", "full"])
def test_methods_that_zero_3_can_shard(tmp_path: Path, method: str) -> None:
    overrides = [f"policy.method={method}", "learner.zero=3"]
    assert load_experiment(write(tmp_path, MINIMAL), overrides).learner.zero == 3


@pytest.mark.parametrize("key", ["estimator", "policy_loss"])
def test_a_function_that_cannot_be_loaded_is_listed_with_file_line_and_key(tmp_path: Path, key: str) -> None:
    own = write(tmp_path, "x = 3\n", "own.py")
    raising = write(tmp_path, "\n1 / 0  # {braces}\n", "raising.py")
    start = f"{tmp_path}/experiment.yaml:5: ppo.{key}:"
    text = f"{MINIMAL}ppo:\n  epochs: 0\n  {key}: "
    message = problem(tmp_path, f"{text}{own}:f\n")
    assert f"{start} {own} has no function f" in message.split("\n")
    assert "ppo.epochs" in message
    assert f"{start} x in {own} is not a function" in problem(tmp_path, f"{text}{own}:x\n").split("\n")
    expected = f"{raising} cannot be imported: ZeroDivisionError: division by zero ({raising}:2)"
    assert f"{start} {expected}" in problem(tmp_path, f"{text}{raising}:f\n").split("\n")
    message = problem(tmp_path, MINIMAL, f"ppo.{key}={own}:f")
    assert message.startswith("override ")
    assert message.endswith(f": ppo.{key}: {own} has no function f")
