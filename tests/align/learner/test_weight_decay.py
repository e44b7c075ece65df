"""Weight decay spares biases and normalisation layers, whatever the method, in SFT, reward training and PPO."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from align.config.ppo_settings import CriticSettings
from align.learner.rank import Rank
from align.roles.build import Blueprint, RewardRole, build_roles
from align.roles.trained import TrainedModule
from policies.schema import ModelSettings, OptimizerSettings, PolicySettings
from tests.align.supervised.small import reward_blueprint, sft_blueprint

Build = Callable[[Path, PolicySettings], TrainedModule]


def sft(model: Path, policy: PolicySettings) -> TrainedModule:
    return sft_blueprint(model, policy).build().module


def reward(model: Path, policy: PolicySettings) -> TrainedModule:
    return reward_blueprint(model, "attributes", policy).build().module


def ppo(model: Path, policy: PolicySettings) -> TrainedModule:
    """The reward model and the critic are of another adapter than the policy."""
    trunk = sft_blueprint(model, policy).build().module.trunk
    head = {"weight": torch.ones(trunk.width), "bias": torch.ones(1)}
    blueprint = Blueprint(
        ModelSettings(path=str(model)), policy, 0, None, (RewardRole(trunk.read_adapter("reference"), (head,)),)
    )
    return build_roles(blueprint, CriticSettings())


def decayed(module: TrainedModule) -> tuple[set[str], set[str]]:
    """The names of the parameters that a step with a gradient of zero changes, and of those that it does not."""
    named: dict[str, nn.Parameter] = {}
    for role, trunk in module.trained_adapters.items():
        named |= {f"{role}: {name}": parameter for name, parameter in trunk.adapter(role).items()}
    for role, head in module.trained_heads.items():
        named |= {f"{role}: head.{name}": parameter for name, parameter in head.named_parameters()}
    with torch.no_grad():
        for parameter in named.values():
            parameter.fill_(1.0)
    rank = Rank(module, OptimizerSettings(weight_decay=0.1), zero=0, gradient_checkpointing=False)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    roles = {name.partition(".")[0] for name in (*module.trained_adapters, *module.trained_heads)}
    rank.step(dict.fromkeys(roles, 0.5) | {"reward.ties": 0.5})
    after = {name: float(parameter.detach().mean()) for name, parameter in named.items()}
    rank.close()
    changed = {name for name, value in after.items() if value < 0.96}
    kept = {name for name, value in after.items() if value == 1.0}
    assert changed | kept == named.keys()
    return changed, kept


def is_spared(name: str) -> bool:
    return "bias" in name.rpartition(".")[2] or "norm" in name or "ties" in name


@pytest.mark.parametrize("build", [sft, reward, ppo])
@pytest.mark.parametrize(
    ("policy", "some"),
    [
        (PolicySettings(rank=2, lora_plus=16.0), "lora_A"),
        (PolicySettings(method="bitfit"), ""),
        (PolicySettings(method="layer_norm"), ""),
        (PolicySettings(method="top_layers"), "mlp"),
        (PolicySettings(method="full"), "embed_tokens"),
        (PolicySettings(method="bottleneck", bottleneck=4), "up"),
        (PolicySettings(method="prompt_tuning", virtual_tokens=2), "prompt"),
        (PolicySettings(method="p_tuning", virtual_tokens=2, encoder_width=8, encoder="lstm"), "weight"),
    ],
    ids=lambda value: value.method if isinstance(value, PolicySettings) else "",
)
def test_biases_and_norms_do_not_decay(
    build: Build, policy: PolicySettings, some: str, tiny_model: Path, process_group: None
) -> None:
    changed, kept = decayed(build(tiny_model, policy))
    assert [name for name in changed if is_spared(name)] == []
    assert [name for name in kept if not is_spared(name)] == []
    if some:
        assert any(some in name for name in changed)
    if policy.method in ("bitfit", "layer_norm", "top_layers", "full", "bottleneck"):
        assert len(kept) >= 3
