"""Complete runs with every kind of preference example and of reward."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from align.cli import app
from align.config.schema import Experiment
from align.data.datasets import read_preferences
from align.evaluation.reward_model import DIAGNOSTICS, RELIABILITY, WORST
from align.outputs.trained_run import evaluate_reward_model
from align.runs.folder import RunFolder, find_run
from align.runs.record_files import METRICS, SAMPLES, read_lines
from align.runtime.signals import StopRequest
from align.stages.pipeline import load_datasets, run_stages
from policies.errors import UserError
from tests.integration.tiny_run import figures, make_settings, run_a_step_at_a_time, run_in_process, write_rows

PROMPTS = [f"User: {i} {i + 1} Assistant:" for i in range(12)]
EXAMPLES: list[dict[str, Any]] = [
    *({"prompt": p, "chosen": " blue.", "rejected": " red dog.", "confidence": 0.8} for p in PROMPTS),
    *({"prompt": p, "responses": [" cat.", " mat.", " red."], "ranks": [2, 1, 2]} for p in PROMPTS),
    *({"prompt": p, "responses": [" cat.", " mat.", " red."], "best": 1} for p in PROMPTS),
    *({"prompt": p, "response": f" {w}.", "rating": i % 3} for i, (p, w) in enumerate(zip(PROMPTS, "abcdefghijkl"))),
]  # fmt: skip
ATTRIBUTE_EXAMPLES: list[dict[str, Any]] = [
    *({"prompt": p, "response": f" {'x' * (i % 5 + 1)}.", "rating": {"kind": i % 3, "brief": -i}}
      for i, p in enumerate(PROMPTS)),
    *({"prompt": p, "chosen": " blue.", "rejected": " red dog.", "attribute": "kind"} for p in PROMPTS),
    *({"prompt": p, "chosen": " blue.", "rejected": " red."} for p in PROMPTS),
]  # fmt: skip
FUNCTION = """
def count(prompts, responses, columns):
    if any(len(r) > 12 for r in responses):
        raise RuntimeError("too long")
    return [float(len(r)) for r in responses]
"""
STEPS = """
def words(prompts, responses, columns):
    if any(len(r) > 12 for r in responses):
        raise RuntimeError("too long")
    return [[(i, i + 1, 0.1 * i + 0.1) for i, c in enumerate(r) if c == "e"] for r in responses]
"""
STEP_TERMS = {
    "words": {"kind": "steps", "function": "{folder}/steps.py:words", "weight": 0.7, "fallback": -1.0},
    "short": {"kind": "length", "max_tokens": 4, "window": 2},
    "cost": {"kind": "regex", "pattern": "a"},
}
TERMS = {
    "model": {"kind": "model", "weight": 0.5},
    "count": {"kind": "function", "function": "{folder}/score.py:count", "fallback": -1.0, "normalise": "running"},
    "short": {"kind": "length", "max_tokens": 4, "window": 2, "normalise": "sft", "clip": [-2, 2]},
    "cost": {"kind": "regex", "pattern": "e"},
}
REWARDS: dict[str, dict[str, Any]] = {
    "mixed": {"rows": EXAMPLES, "ratings": "ordinal", "label_smoothing": 0.05, "centering": 0.01},
    "attributes": {"rows": ATTRIBUTE_EXAMPLES, "attributes": {"kind": 0.7, "brief": 0.3}},
    "ensemble": {"ensemble": {"members": 2, "combine": "mean_minus_std", "penalty": 0.5}},
    "patience": {"evaluate_every": 1, "patience": 1, "epochs": 3, "learning_rate": 0.5},
    "head": {"trains": "head"},
    "composed": {"terms": TERMS, "constraint": {"term": "cost", "at_most": 0.2, "rate": 0.5}},
    "steps": {"terms": STEP_TERMS, "constraint": {"term": "cost", "at_most": 0.2, "rate": 0.5}},
    "rules": {"terms": {name: term for name, term in TERMS.items() if name != "model"}},
}


def settings_of(name: str, model: Path, folder: Path) -> dict[str, Any]:
    settings, reward = make_settings(model, folder), dict(REWARDS[name])
    if rows := reward.pop("rows", None):
        settings["data"]["preferences"] = write_rows(folder / "feedback.jsonl", rows)
    if name == "composed":
        few = {"system": "Answer.", "examples": [{"prompt": "User: 1 Assistant:", "completion": " one."}]}
        (folder / "colours.txt").write_text("Answer: red.")
        lookup = {"retrieval": {"documents": str(folder / "colours.txt")}, "answer_after": "e"}
        settings["evaluation"] |= {"temperature": 0.5, "prompt_styles": {"few": few, "lookup": lookup}}
    (folder / "score.py").write_text(FUNCTION)
    (folder / "steps.py").write_text(STEPS)
    settings["reward"] |= json.loads(json.dumps(reward).replace("{folder}", str(folder)))
    return settings


def of_stage(run: Path, stage: str) -> list[dict[str, Any]]:
    return [row for row in read_lines(run / METRICS) if row["stage"] == stage]


def ppo_steps(run: Path) -> list[dict[str, Any]]:
    return [row for row in of_stage(run, "ppo") if "policy/loss" in row]


FAST = ("composed", "steps")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in REWARDS])
def test_a_run_stopped_after_every_step_resumes_bit_for_bit(name: str, tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of(name, tiny_model, tmp_path)
    complete = run_in_process(settings)
    steps = ppo_steps(complete)
    assert len(steps) == 3
    assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))
    stopped = run_a_step_at_a_time(settings | {"name": "stopped"})
    assert figures(stopped) == figures(complete)


def test_every_member_of_an_ensemble_is_trained_and_their_spread_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("ensemble", tiny_model, tmp_path))
    losses = [row for row in of_stage(run, "reward") if "reward_model/loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    heads = [(run / "reward" / member / "head.safetensors").read_bytes() for member in ("", "member-1")]
    assert heads[0] != heads[1]
    found = json.loads((run / "reward" / DIAGNOSTICS).read_text())
    assert len(found["members"]) == 2
    assert 0 <= found["agreement"] <= 1
    assert all(row["reward/spread"] > 0 for row in ppo_steps(run))
    assert RunFolder(run).read_evaluation()["policy"]["spread_mean"] > 0

    def export(*more: str) -> Result:
        return CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "out"), "--reward", *more])

    for member, message in ((), "choose --member 0 to 1"), (("--member", "2"), "holds 2, counted from 0"):
        assert message in str(export(*member).exception)
    assert export("--member", "1").exit_code == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")["score.weight"]
    assert torch.equal(saved[0], load_file(run / "reward" / "member-1" / "head.safetensors")["weight"])


def test_attributes_are_logged_and_can_be_reweighted(tiny_model: Path, tmp_path: Path) -> None:
    settings = settings_of("attributes", tiny_model, tmp_path)
    run = run_in_process(settings)
    assert all({"reward/attribute/kind", "reward/attribute/brief"} <= row.keys() for row in ppo_steps(run))
    reward = settings["reward"] | {"model": str(run / "reward"), "attributes": {"brief": 1.0}}
    again = run_in_process(settings | {"name": "again", "reward": reward})
    (first, *_) = of_stage(again, "ppo")
    assert "reward/attribute/kind" not in first
    assert first["reward/mean"] != of_stage(run, "ppo")[0]["reward/mean"]


def test_training_ends_early_and_keeps_the_best(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("patience", tiny_model, tmp_path))
    losses = [row["reward_model/heldout_loss"] for row in of_stage(run, "reward") if "reward_model/heldout_loss" in row]
    facts = json.loads((run / "reward" / "stage.json").read_text())
    best = losses.index(min(losses)) + 1
    assert facts["best_step"] == best
    assert facts["steps"] == best + 1 == len(losses) < 9
    assert facts["heldout_loss"] == min(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patience", "ensemble"])
def test_a_kill_between_the_last_checkpoint_and_the_product_costs_no_step(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    settings = settings_of(name, tiny_model, tmp_path) | {"stages": ["sft", "reward"]}
    run = run_in_process(settings)
    before, weights = figures(run), (run / "reward" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "reward")
    lines = (run / METRICS).read_text().splitlines(keepends=True)
    (run / METRICS).write_text("".join(lines[:-1]))  # the accuracy is logged just before the product is written
    for done in sorted((run / "checkpoints" / "reward").glob("done-*"))[-1:]:
        shutil.rmtree(done)
    experiment = Experiment.model_validate(settings)
    run_stages(experiment, RunFolder(run), load_datasets(experiment), StopRequest())
    assert figures(run) == before
    assert (run / "reward" / "adapter_model.safetensors").read_bytes() == weights


def test_a_head_alone_leaves_the_adapter_as_it_was(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("head", tiny_model, tmp_path))
    adapters = [(run / stage / "adapter_model.safetensors").read_bytes() for stage in ("sft", "reward")]
    assert adapters[0] == adapters[1]


def test_every_term_is_logged_by_its_name(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("composed", tiny_model, tmp_path))
    steps = ppo_steps(run)
    for row in steps:
        assert {f"reward/term/{name}" for name in TERMS} | {"reward/failed/count"} <= row.keys()
        assert -2 <= row["reward/term/short"] <= 2
    multipliers = [row["reward/multiplier"] for row in steps]
    expected = 0.0
    for row, multiplier in zip(steps, multipliers):
        expected = max(0.0, expected + 0.5 * (row["reward/term/cost"] - 0.2))
        assert multiplier == pytest.approx(expected)
    # Scores of a stateful reward are not comparable: the last policy is kept, whatever its score.
    assert json.loads((run / "policy" / "evaluation.json").read_text())["policy"]["step"] == 3


def test_the_reference_is_evaluated_with_other_prompt_styles_too(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("composed", tiny_model, tmp_path))
    evaluation = RunFolder(run).read_evaluation()
    for style in evaluation["prompt_styles"].values():
        assert {"score_mean", "length_mean", "win_rate"} <= style.keys()
        assert style["score_mean"] != evaluation["reference"]["score_mean"]


def test_step_rewards_are_logged_and_part_of_every_score(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("steps", tiny_model, tmp_path))
    steps = ppo_steps(run)
    assert all({"reward/steps/words", "reward/term/short", "reward/failed/words"} <= row.keys() for row in steps)
    samples = [row for row in read_lines(run / SAMPLES) if "step_rewards" in row]
    assert len(samples) == 3 * 4
    for row in samples:
        factor = 0.7 / (1 + multiplier_before(steps, row["step"]))
        assert sum(reward for _, reward in row["step_rewards"]) == pytest.approx(factor * row["steps/words"], rel=1e-5)


def multiplier_before(steps: list[dict[str, Any]], step: int) -> float:
    return steps[step - 2]["reward/multiplier"] if step > 1 else 0.0


def test_rules_alone_need_no_reward_stage(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(settings_of("rules", tiny_model, tmp_path))
    assert not (run / "reward").exists()
    assert not of_stage(run, "reward")


@pytest.mark.slow
def test_a_rule_ends_ppo_and_the_best_policy_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["ppo"] |= {"stop": {"metric": "kl/per_sequence", "above": -1e9, "patience": 2}}
    complete = run_in_process(settings)
    assert [row["step"] for row in ppo_steps(complete)] == [1, 2]
    assert "kl/per_sequence is" in json.loads((complete / "policy" / "stage.json").read_text())["stopped"]
    stopped = run_a_step_at_a_time(settings | {"name": "stopped"})
    assert figures(stopped) == figures(complete)


def test_the_diagnostics_are_saved_beside_the_model(finished: Path) -> None:
    found = json.loads((finished / "reward" / DIAGNOSTICS).read_text())
    assert {
        *("accuracy", "log_loss", "brier", "calibration_error", "reliability", "by_length_difference"),
        *("baselines", "invariance", "sft_scores"),
    } <= found.keys()
    assert max(found["invariance"].values()) <= 1e-5
    assert (finished / "reward" / RELIABILITY).is_file()
    wrong = round((1 - found["accuracy"]) * found["pairs"])
    assert len((finished / "reward" / WORST).read_text().splitlines()) == min(wrong, 20)


def test_evaluating_the_reward_model_again_gives_the_same_figures(finished: Path) -> None:
    """On the scale of training, though the saved head is normalised."""
    run, experiment = find_run(str(finished))
    again, _ = evaluate_reward_model(experiment, run, read_preferences(experiment, None), None)
    found = json.loads((finished / "reward" / DIAGNOSTICS).read_text())
    assert json.loads((finished / "reward" / "stage.json").read_text())["moments"][0][1] != 1.0
    for name in ("accuracy", "log_loss", "brier", "calibration_error"):
        assert again[name] == pytest.approx(found[name], rel=1e-4)


def test_held_out_examples_of_kinds_that_training_lacks_are_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["data"]["preferences_heldout"] = write_rows(tmp_path / "heldout.jsonl", EXAMPLES)
    run = run_in_process(settings | {"stages": ["reward"]})
    assert "rank_correlation" in json.loads((run / "reward" / DIAGNOSTICS).read_text())


def test_a_column_that_a_term_reads_and_a_row_lacks_is_reported_before_the_run(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = make_settings(tiny_model, tmp_path)
    settings["reward"]["terms"] = {"right": {"kind": "number", "column": "answer"}}
    with pytest.raises(UserError, match=r"reward.terms.right reads the column 'answer', which a row .* has none"):
        run_in_process(settings)
