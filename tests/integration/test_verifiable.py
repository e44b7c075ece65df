"""Accuracy and pass@k of a whole run, by a rule, against samples that are drawn and judged by hand."""

import json
import math
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

import align
from align.evaluation.policy import HeldoutPlan
from align.stages.pipeline import load_datasets
from policies.text.tokenization import decode_response
from rollouts.engine import Sampling
from tests.integration.tiny_run import make_settings, run_in_process

SAMPLES = 3


def test_the_policy_and_the_reference_have_accuracy_and_pass_at_k(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft", "ppo"]}
    settings["reward"] |= {
        "terms": {
            "vowel": {"kind": "regex", "pattern": "[eo]", "weight": 0.5},
            "short": {"kind": "length", "max_tokens": 4},
        }
    }
    settings["ppo"] |= {"steps": 1}
    settings["evaluation"] = {"prompts": 4, "every": 1, "samples_per_prompt": SAMPLES, "best_of": 2}
    run = align.open_run(run_in_process(settings))
    evaluation = run.evaluation
    requests = HeldoutPlan(
        load_datasets(run.experiment).prompts_heldout,
        Sampling(1.0, 6),
        run.experiment.evaluation.seed,
        samples_per_prompt=SAMPLES,
    ).draws()
    right = []
    for draw in requests:
        sampled = run.sample(draw, Sampling(run.experiment.rollouts.temperature, 6))
        texts = [decode_response(run.tokenizer, trajectory.response_ids) for trajectory in sampled]
        right.append(["e" in text or "o" in text for text in texts])
    by_prompt = list(zip(*right, strict=True))
    policy = evaluation["policy"]
    assert policy["accuracy/vowel"] == pytest.approx(fmean(map(fmean, by_prompt)))
    passes = [fmean(any(choice) for choice in combinations(samples, 2)) for samples in by_prompt]
    assert policy["pass_at_2/vowel"] == pytest.approx(fmean(passes))
    assert policy["pass_at_3/vowel"] == pytest.approx(fmean(map(any, by_prompt)))
    reference = evaluation["reference"]
    assert policy["accuracy_gain/vowel"] == pytest.approx(policy["accuracy/vowel"] - reference["accuracy/vowel"])
    assert not any("short" in name for name in policy)
    assert evaluation["best_of"]["n"] == 2
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in logged if "eval/score_mean" in row]
    assert row["eval/accuracy/vowel"] == policy["accuracy/vowel"]
    assert math.isfinite(row["eval/pass_at_2_low/vowel"])
