"""A run's policy, scaled: sampled, evaluated and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from align.cli import app
from align.outputs.run_comparison import compare_runs, comparison_file
from align.outputs.trained_run import open_run
from align.stages.distance import DistanceStudy
from policies.errors import UserError
from policies.files.adapters import CONFIG

PROMPTS = ["User: cat dog Assistant:", "User: red door Assistant:"]


def kl_and_gain(run: Path, scale: float) -> tuple[float, float]:
    figures = open_run(run, scale=scale).evaluate()["policy"]
    return figures["kl_per_sequence"], figures["score_gain"]


def test_0_is_the_reference_and_the_policy_moves_away_from_it(finished: Path) -> None:
    before = (finished / "evaluation.json").read_bytes()
    assert kl_and_gain(finished, 0.0) == (0, 0)
    half, twice = (kl_and_gain(finished, scale)[0] for scale in (0.5, 2.0))
    trained = json.loads(before)["policy"]["kl_per_sequence"]
    assert 0 < half < trained < twice
    assert (finished / "evaluation.json").read_bytes() == before


def test_1_is_the_policy(finished: Path) -> None:
    plain, scaled = open_run(finished), open_run(finished, scale=1.0)
    assert plain.generate(PROMPTS, seed=3) == scaled.generate(PROMPTS, seed=3)
    nearly = open_run(finished, scale=1.0 + 1e-12)  # by the joined matrices
    assert nearly._policy.settings.rank == 2 * plain.experiment.policy.rank
    assert plain.generate(PROMPTS, temperature=0) == nearly.generate(PROMPTS, temperature=0)


def test_the_frontier_is_measured_once_and_policies_beside_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(finished)
    figures = run.frontier(samples=8, scales=(0.0, 30.0, 60.0))
    assert run.evaluation["frontier"] == figures
    assert (finished / "frontier" / "frontier.png").is_file()
    still, near, far = figures["policies"]
    assert (still["scale"], still["kl"]) == (0, 0)
    assert 0 < near["kl"] < far["kl"]
    assert [draw["n"] for draw in figures["best_of"]] == [2, 4, 8]
    assert all(draw["score_gain"] > 0 for draw in figures["best_of"])
    monkeypatch.delattr(DistanceStudy, "_draw_reference")  # its responses are kept
    assert run.frontier(samples=8, scales=(0.0, 30.0, 60.0)) == figures


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("reward.terms.model.normalise=running", "the reward changes"),
        ("ppo.on_truncation=bootstrap", "truncated responses have no score"),
    ],
)
def test_a_reward_that_is_not_fixed_has_no_frontier(finished: Path, settings: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        open_run(finished, [settings]).frontier(samples=8)


def test_a_single_held_out_prompt_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="two are needed"):
        open_run(finished, ["evaluation.prompts=1"]).frontier(samples=8)


def test_a_scaled_policy_is_compared_in_a_file_of_its_own(finished: Path) -> None:
    run = open_run(finished)
    assert comparison_file(run, run).name == f"{finished.name}.json"
    assert comparison_file(open_run(finished, scale=0.5), run).name == f"{finished.name}-scale-0.5.json"


def test_runs_in_an_environment_are_not_compared_without_it(finished: Path) -> None:
    run = open_run(finished, ["rollouts.environment=reply.py:reply"])
    with pytest.raises(UserError, match="samples without an environment"):
        compare_runs(run, open_run(finished))


def test_an_odd_number_of_samples_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="an even number"):
        open_run(finished).frontier(samples=7)


def test_an_exported_scaled_adapter_is_what_plain_peft_loads(finished: Path, tmp_path: Path) -> None:
    open_run(finished, scale=0.5).export(tmp_path / "half")
    assert "reference + 0.5" in (tmp_path / "half" / "README.md").read_text()
    run = open_run(finished, scale=0.5)
    rank = run.experiment.policy.rank
    assert json.loads((tmp_path / "half" / CONFIG).read_text())["r"] == 2 * rank

    base = AutoModelForCausalLM.from_pretrained(run.experiment.model.path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    logits = {}
    for name in ("sft", "policy"):
        delta = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(run.experiment.model.path), finished / name
        ).merge_and_unload()
        logits[name] = dict(delta.named_parameters())
    for name, weight in base.named_parameters():
        weight.data = (logits["sft"][name] + logits["policy"][name]).detach() / 2
    exported = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(run.experiment.model.path), tmp_path / "half"
    )
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("export", "--to", "x", "--reward", "--scale", "0.5"), "--scale is for the policy"),
        (("eval", "--reward", "--scale", "0.5"), "--scale is for the policy"),
        (("generate", "--prompt", "cat", "--scale", "nan"), "a finite number"),
    ],
)
def test_a_scale_without_effect_or_sense_is_refused(finished: Path, arguments: tuple[str, ...], problem: str) -> None:
    command, *options = arguments
    with pytest.raises(UserError, match=problem):
        CliRunner().invoke(app, [command, str(finished), *options], catch_exceptions=False)


@pytest.mark.parametrize("samples", ["0", "-2"])
def test_too_few_samples_are_refused_by_the_command(finished: Path, samples: str) -> None:
    done = CliRunner().invoke(app, ["eval", str(finished), "--frontier", samples])
    assert done.exit_code == 2
    assert "--frontier" in done.output


def test_a_run_without_a_policy_has_nothing_to_scale(finished: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(finished, tmp_path / "begun", ignore=shutil.ignore_patterns("policy"))
    with pytest.raises(UserError, match="has no policy"):
        open_run(begun, scale=0.5).generate(PROMPTS)
