"""AdaLoRA in the stages: SFT distributes the ranks, and later stages keep them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from align.supervised.learner import SupervisedLearner
from align.supervised.reward_objective import RewardBlueprint
from align.supervised.sft_objective import SftBlueprint
from policies.build import build_trunk
from policies.layers.rank_allocation import Triplets, orthogonality
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights
from rewards.schema import FitSettings
from tests.align.supervised.small import random_adapter, reward_blueprint, sft_blueprint

POLICY = PolicySettings(method="adalora", rank=2, alpha=8, allocation_end=0.6)
SETTINGS = FitSettings(batch_size=2, epochs=2, learning_rate=1e-2)
LAYERS = 14
"""Linear layers of the tiny model."""


def train(blueprint: SftBlueprint | RewardBlueprint, settings: FitSettings) -> tuple[AdapterWeights, list[int]]:
    """The adapter after a few steps, and how many singular values were not zero after each."""
    learner = SupervisedLearner(blueprint.build(), settings, zero=0, seed=0)
    counts = []
    for step in range(learner.steps):
        learner.train([2 * step % 8, (2 * step + 1) % 8], step, 1.0)
        (adapter,) = learner.product().adapters.values()
        counts.append(sum(int((value != 0).sum()) for value in singular_values(adapter).values()))
    learner.close()
    return adapter, counts


def singular_values(adapter: AdapterWeights) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in adapter.items() if name.endswith("lora_E")}


@pytest.mark.usefixtures("process_group")
def test_sft_cuts_the_ranks_to_the_budget_and_the_reward_model_keeps_them(tiny_model: Path) -> None:
    sft, counts = train(sft_blueprint(tiny_model, POLICY), SETTINGS)
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert counts[4:] == [2 * LAYERS] * 4
    by_layer = [int((value != 0).sum()) for value in singular_values(sft).values()]
    assert len(set(by_layer)) > 1  # the layers have different ranks

    blueprint = reward_blueprint(tiny_model, "pairs", POLICY, sft, batch_size=2)
    reward, counts = train(blueprint, blueprint.settings)
    assert set(counts) == {2 * LAYERS}
    for name, value in singular_values(sft).items():
        trained = singular_values(reward)[name]
        assert torch.equal(trained == 0, value == 0)
        assert value.any() == (trained != value).any()


def test_the_penalty_is_added_to_the_gradient(tiny_model: Path) -> None:
    trunk = build_trunk(ModelSettings(path=str(tiny_model)), POLICY, ("policy", "critic"))
    trunk.write_adapter("policy", random_adapter(tiny_model, POLICY))
    trunk.train_only("policy")
    weights = trunk.adapter("policy")
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    trunk.before_step("policy")
    layers = []
    for name in singular_values(trunk.read_adapter("policy")):
        left, right = weights[name.replace("lora_E", "lora_B")], weights[name.replace("lora_E", "lora_A")]
        layers.append(Triplets(left, weights[name], right))
    trained = [tensor for layer in layers for tensor in (layer.left, layer.right)]
    for tensor, gradient in zip(trained, torch.autograd.grad(0.5 * orthogonality(layers), trained), strict=True):
        torch.testing.assert_close(tensor.grad, 1 + gradient)
