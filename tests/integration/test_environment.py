"""PPO in an environment that replies to responses, in a whole run on the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.schema import Experiment
from align.stages.pipeline import load_datasets
from policies.errors import UserError
from tests.integration.tiny_run import make_settings, run_in_process

FUNCTION = """
def reply(prompts, responses, columns):
    return [None if "[5]" in response else "[5] " for response in responses]
"""


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tool.py").write_text(FUNCTION)
    made = make_settings(tiny_model, tmp_path) | {"stages": ["ppo"]}
    made["reward"] = {"terms": {"short": {"kind": "length", "max_tokens": 30, "window": 25}}}
    made["rollouts"] = {
        "max_num_seqs": 4,
        "max_new_tokens": 30,
        "stop": ["e", "a", "o"],
        "environment": f"{tmp_path}/tool.py:reply",
    }
    made["ppo"] = {"steps": 2, "batch_size": 8, "minibatches": 2}
    made["evaluation"] = {"prompts": 4}
    return made


def test_the_tokens_of_the_environment_are_neither_sampled_nor_trained(settings: dict[str, Any]) -> None:
    run = run_in_process(settings)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "rollout/inserted_share" in row]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["rollout/inserted_share"] < 1
        assert step["rollout/mismatch_max"] < 1e-3  # the policy continues from the reply as the learner reads it
    assert steps[0]["kl/per_sequence"] == pytest.approx(0, abs=1e-4)  # of other tokens it would be far from 0
    assert steps[0]["policy/ratio_max"] < 1.5
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert any("[5]" in sample["response"] for sample in samples if "response" in sample)


def test_a_function_that_is_missing_is_named_before_the_run(settings: dict[str, Any]) -> None:
    settings["rollouts"]["environment"] = "no_tool.py:reply"
    with pytest.raises(UserError, match=r"rollouts.environment: file no_tool.py does not exist"):
        load_datasets(Experiment.model_validate(settings))


def test_it_replies_while_the_learner_waits(settings: dict[str, Any]) -> None:
    settings["rollouts"] |= {"workers": 1, "max_staleness": 1}
    with pytest.raises(ValidationError, match="environment: it replies while the learner waits"):
        Experiment.model_validate(settings)
