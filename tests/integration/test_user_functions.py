"""A run with an advantage estimator, a policy loss and a reward term of the user's own, from files outside of align."""

from pathlib import Path
from typing import Any

import pytest

from align.config.schema import Experiment
from align.resources.plan import make_plan
from align.runs.fingerprint import user_functions
from align.stages.pipeline import load_datasets
from tests.integration.tiny_run import figures, run_in_process

ESTIMATOR = """
from align import advantage_estimator

@advantage_estimator(min_samples=2)
def leave_one_out(batch):
    \"\"\"RLOO as a user would write it, for two samples per prompt.\"\"\"
    totals = [float(rewards.sum()) for rewards in batch.rewards]
    advantages = []
    for i, rewards in enumerate(batch.rewards):
        other = totals[i + 1] if i % 2 == 0 else totals[i - 1]
        advantages.append(0 * rewards + (totals[i] - other))
    return advantages, batch.values
"""

POLICY_LOSS = """
import torch

def surrogate(logprobs, old_logprobs, advantages, ppo):
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return loss, (loss != -advantages * ratio).float()
"""

REWARD = """
def shortness(prompts, responses, columns):
    return [-float(len(response)) for response in responses]
"""


@pytest.fixture
def own(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings with a rollout worker and a learner rank that use functions from files."""
    for name, text in (("estimator", ESTIMATOR), ("policy_loss", POLICY_LOSS), ("reward", REWARD)):
        (tmp_path / f"own_{name}.py").write_text(text)
    settings["stages"] = ["sft", "ppo"]
    settings["reward"] = {"terms": {"short": {"kind": "function", "function": f"{tmp_path}/own_reward.py:shortness"}}}
    settings["ppo"] |= {
        "steps": 2,
        "samples_per_prompt": 2,
        "estimator": f"{tmp_path}/own_estimator.py:leave_one_out",
        "policy_loss": f"{tmp_path}/own_policy_loss.py:surrogate",
    }
    settings["rollouts"] |= {"workers": 1, "chunk_size": 8}
    settings["learner"] |= {"ranks": 1}
    return settings


@pytest.mark.slow
def test_functions_from_files_train_in_actors_as_the_built_in_ones_do(own: dict[str, Any]) -> None:
    built_in = own | {"name": "built-in", "ppo": own["ppo"] | {"estimator": "rloo", "policy_loss": "clip"}}
    ours, theirs = figures(run_in_process(own)), figures(run_in_process(built_in))
    steps = [row for row in ours if "policy/loss" in row]
    assert len(steps) == 2
    assert all(row["reward/mean"] < 0 for row in steps)
    for row, other in zip(ours, theirs, strict=True):
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=1e-3, abs=1e-5)


def test_the_plan_and_the_fingerprint_name_the_functions(own: dict[str, Any]) -> None:
    experiment = Experiment.model_validate(own)
    lines = dict(make_plan(experiment, load_datasets(experiment), ["ppo"]).lines)
    assert lines["estimator"] == own["ppo"]["estimator"]
    assert lines["policy loss"] == own["ppo"]["policy_loss"]
    assert lines["reward terms"] == f"short (function {own['reward']['terms']['short']['function']})"
    assert set(user_functions(experiment)) == {"ppo.estimator", "ppo.policy_loss", "reward.terms.short.function"}
