"""In supervised stages one norm, over all parameter groups, clips the gradient."""

import math
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Optimizer

from align.runs.record_files import read_lines
from align.supervised.fit import fit
from align.supervised.learner import SupervisedLearner
from tests.align.supervised.small import LORA, random_adapter, reward_blueprint
from tests.align.supervised.toy import context_in, local_learners

LIMIT = 0.001


def gradient_norms(
    model: Path, folder: Path, lora_plus: float | None, zero: int, limit: float
) -> tuple[dict[str, float], float]:
    """The norm of each parameter group's gradient as the optimizer takes it, and the norm that is logged."""
    policy = LORA.model_copy(update={"lora_plus": lora_plus})
    adapter = random_adapter(model, policy)
    blueprint = reward_blueprint(model, "rankings", policy, adapter, batch_size=10, centering=1.0, max_grad_norm=limit)
    settings = blueprint.settings
    seen: dict[str, float] = {}

    def note(optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            parts = [parameter.grad.norm() for parameter in group["params"] if parameter.grad is not None]
            if parts:
                seen[group["role"]] = math.hypot(*map(float, parts))

    def watch(learner: SupervisedLearner) -> None:
        learner.rank.optimizer.register_step_pre_hook(note)

    context = context_in(folder, zero=zero)
    with local_learners(blueprint.build, settings, zero) as learners:
        learners.ranks.call(watch)
        fit(learners, [example.length for example in blueprint.examples], settings, context)
    (logged,) = (row["sft/gradient_norm"] for row in read_lines(folder / "metrics.jsonl") if "sft/loss" in row)
    return seen, logged


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("lora_plus", [None, 16.0])
def test_all_groups_are_scaled_by_one_factor(
    lora_plus: float | None, zero: int, tiny_model: Path, tmp_path: Path
) -> None:
    """A, B, the head's weight and bias, and the δ of ties."""
    expected, _ = gradient_norms(tiny_model, tmp_path / "free", lora_plus, zero=0, limit=1e9)
    norm = math.hypot(*expected.values())
    groups = {"reward", "reward.undecayed", "reward.ties"} | ({"reward.up"} if lora_plus else set())
    assert expected.keys() == groups
    assert min(expected.values()) > 10 * LIMIT
    clipped, logged = gradient_norms(tiny_model, tmp_path / "clipped", lora_plus, zero, LIMIT)
    assert clipped == pytest.approx({name: LIMIT * part / norm for name, part in expected.items()}, rel=1e-3)
    assert logged == pytest.approx(norm, rel=1e-5)
