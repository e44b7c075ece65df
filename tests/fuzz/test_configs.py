"""Damaged experiment files: each results in settings or a UserError."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from align.config.load import dump_experiment, load_experiment
from policies.errors import UserError
from rewards.terms.json_schema import JsonTerm
from tests.fuzz.harm import altered, confined, damaged, odd_text, odd_value, refusal, run

TERMS: dict[str, Any] = {
    "model": {"kind": "model", "weight": 2.0, "clip": [-1, 1]},
    "rule": {"kind": "regex", "pattern": "[0-9]+", "full_match": True},
    "form": {"kind": "json", "schema": {"type": "object", "properties": {"a": {"$ref": "#/x"}}}},
    "own": {"kind": "function", "function": "f.py:score", "timeout": 3, "fallback": 0},
    "far": {"kind": "endpoint", "url": "http://127.0.0.1:9/", "key_env": "HOME", "retries": 0},
    "judge": {"kind": "judge", "url": "http://127.0.0.1:9", "model": "m", "scale": [0, 10]},
    "long": {"kind": "length", "max_tokens": 9, "window": 2},
    "sum": {"kind": "number", "tolerance": 0.1},
}
FULL: dict[str, Any] = {
    "name": "x",
    "seed": 3,
    "runs": "runs/${name}",
    "stages": ["sft", "reward", "ppo"],
    "model": {"path": "m", "dtype": "float32"},
    "policy": {"method": "lora", "rank": 4, "alpha": 8.0, "targets": ["q_proj"], "lora_plus": None},
    "data": {
        "demonstrations": "d.jsonl",
        "preferences": {"path": ["a.jsonl", "b.csv"], "columns": {"chosen": "better"}, "limit": 3},
        "prompts": {"path": "${runs}/p.jsonl"},
        "on_bad_row": "skip",
    },
    "sft": {"batch_size": 12, "learning_rate": 1e-3, "evaluate_every": 2, "patience": 1},
    "reward": {
        "terms": TERMS,
        "attributes": {"helpful": 0.7},
        "ensemble": {"members": 2, "combine": "minimum"},
        "constraint": {"term": "sum", "at_most": 0.5},
    },
    "rollouts": {"max_num_seqs": 4, "stop": ["\n\n"], "vllm": {}, "temperature": 0.7},
    "ppo": {
        "batch_size": 8,
        "minibatches": 2,
        "kl": {"target": 1.0},
        "critic": {"kind": "head"},
        "stop": {"metric": "kl/per_sequence", "above": 3},
    },
    "learner": {"zero": 2, "schedule": "cosine"},
    "evaluation": {
        "prompt_styles": {"few": {"examples": [{"prompt": "a", "completion": "b"}], "suffix": "."}},
        "seed": 5,
    },
    "tracking": {"wandb": "disabled"},
}
SNIPPETS = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e, *e]\n",
    "a: &a {b: *a}\n",
    "a: &a [*a]\n",
    "a: *nowhere\n",
    "x: !!python/object/apply:os.system ['touch planted']\n",
    "x: !!python/name:os.system\n",
    "x: !!binary '%%%'\n",
    "x: !!set {a, b}\n",
    "x: !!omap [a: 1]\n",
    "x: !!timestamp nothing\n",
    "x: 2024-13-45\n",
    "x: !!int ''\n",
    "x: !!bool perhaps\n",
    "x: !!float {}\n",
    "x: 0x_\n",
    f"seed: {'9' * 5000}\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "1: 2\n",
    "null: 2\n",
    "<<: {seed: 1}\n",
    "<<: [1, 2]\n",
    "x: " + "[" * 3000 + "\n",
    "x: " + "{a: " * 3000 + "\n",
    "- \n" * 3,
    "--- a\n--- b\n",
    "%YAML 9.9\n---\n",
    "seed: 1\nseed: 2\n",
    "include: experiment.yaml\n",
    "include: ''\n",
    'include: "a\\0b"\n',
    "include: [other.yaml, other.yaml]\n",
    "include: /dev\n",
    "include: 3\n",
    'runs: "\\ud800"\n',
    'runs: "a\\0b"\n',
    "runs: ${runs}\n",
    "runs: ${a.b.c}\n",
    "runs: ${oc.env:NOT_SET_ANYWHERE}\n",
    "runs: ${oc.decode:'[1'}\n",
    "runs: ${oc.create:{a:1}}\n",
    "runs: ${unknown:1}\n",
    "runs: " + "${" * 40 + "\n",
    "runs: ${model}\n",
    "name: ???\n",
    "\t",
    "reward: {terms: {a: {kind: regex, pattern: 'a{99999999999}'}}}\n",
    "reward: {terms: {a: {kind: json, schema: {$schema: [1]}}}}\n",
    "reward: {terms: {a: {kind: json, schema: {$schema: 3, type: nothing}}}}\n",
    "reward: {terms: {a: {kind: json, schema: {$ref: 'http://127.0.0.1:9/x'}}}}\n",
    "reward: {terms: {a: {kind: json, schema: 'experiment.yaml'}}}\n",
    "reward: {terms: {a: {kind: json, schema: 'number.json'}}}\n",
    "reward: {terms: {a: {kind: [], pattern: x}}}\n",
)
KEYS = ("name", "model.path", "ppo.kl", "reward.terms", "x.y")
override = st.one_of(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(odd_text, odd_value, st.sampled_from(SNIPPETS))),
    st.builds("{}={}".format, odd_text, odd_text),
    st.builds("{}:={}".format, st.sampled_from(KEYS), st.one_of(odd_text, odd_value)),
    st.builds("~{}".format, st.one_of(st.sampled_from(KEYS), odd_text)),
    st.builds(lambda depth: "a." * depth + "b=1", st.sampled_from([2, 100, 5000])),
    st.text(max_size=10),
)


def _mixed(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    tree = draw(altered(draw(st.sampled_from([FULL, {"name": "x", "model": {"path": "m"}}]))))
    text = yaml.safe_dump(tree, sort_keys=False)
    for snippet in draw(st.lists(st.sampled_from(SNIPPETS), max_size=1)):
        text = text + snippet if draw(st.booleans()) else snippet + text
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 2)) == 0:
        content = draw(damaged(content))
    return content, draw(st.lists(override, max_size=2))


files = st.composite(_mixed)()


@pytest.mark.parametrize("examples", [250, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])])
def test_a_damaged_experiment_results_in_settings_or_a_user_error(tmp_path: Path, examples: int) -> None:
    (tmp_path / "other.yaml").write_text("seed: 7\n")
    (tmp_path / "number.json").write_text("3")

    def check(example: tuple[bytes, list[str]]) -> None:
        content, overrides = example
        path = tmp_path / "experiment.yaml"
        path.write_bytes(content)
        with confined(tmp_path):
            message = refusal(lambda: load_experiment(path, overrides))
            if message is not None:
                assert message.strip()
                assert len(message) < 100_000
                return
            experiment = load_experiment(path, overrides)
            dump_experiment(experiment, tmp_path / "config.yaml")
            assert load_experiment(tmp_path / "config.yaml") == experiment

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run(check, files, examples)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_each_snippet_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snippet: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.yaml").write_text("seed: 7\n")
    Path("number.json").write_text("3")
    for text in (snippet, f"model: {{path: m}}\nname: x\n{snippet}"):
        Path("experiment.yaml").write_text(text)
        with confined(tmp_path):
            message = refusal(lambda: load_experiment("experiment.yaml"))
            assert message is None or "experiment.yaml" in message
    assert not Path("planted").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SNIPPETS[0], "experiment.yaml:5: not valid YAML: more than 10000 values"),
        ("a: &a {b: *a}\n", "experiment.yaml:1: not valid YAML: a contains itself"),
        ("a: 1\nx: " + "[" * 200 + "\n", "experiment.yaml:2: not valid YAML: more than"),
        ("a: 1\nx: 2024-13-45\n", "experiment.yaml:2: not valid YAML: not a valid timestamp"),
        ('name: x\nmodel: {path: m}\nruns: "a\\0b"\n', "experiment.yaml:3: runs: "),
        ('name: x\nmodel: {path: "a\\ud800"}\n', "experiment.yaml:2: model.path: "),
    ],
)
def test_an_error_names_its_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "experiment.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_experiment(tmp_path / "experiment.yaml")
    assert expected in str(caught.value)


def test_allowed_nesting_is_read(tmp_path: Path) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(20):
        schema = {"items": schema}
    tree = {"name": "x", "model": {"path": "m"}, "reward": {"terms": {"a": {"kind": "json", "schema": schema}}}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    experiment = load_experiment(tmp_path / "experiment.yaml")
    term = experiment.reward.terms["a"]
    assert isinstance(term, JsonTerm)
    assert term.schema_ == schema
