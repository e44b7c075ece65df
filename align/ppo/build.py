"""From the products of the earlier stages to the learner's four roles."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.ppo.roles import Roles
from align.seeds import seed_for
from policies.heads import ScalarHead
from policies.loading import load_base
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk


@dataclass(frozen=True)
class Blueprint:
    """All that a process needs to build the roles; it travels to the learner's ranks.

    reference: the SFT adapter, or None: the base as it is. reward, reward_head: of the reward model on the trunk, or
    None where the reward is something else.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    reference: AdapterWeights | None
    reward: AdapterWeights | None
    reward_head: Mapping[str, Tensor] | None


def build_roles(blueprint: Blueprint, extra_roles: tuple[str, ...] = ()) -> Roles:
    """Policy and reference start from the SFT adapter; the critic, adapter and head, from the reward model.

    Without a reward model on the trunk the critic starts from the SFT adapter and says 0, the mean of a normalised
    reward. Without an SFT adapter those that would start from it start as adapters that change nothing.
    extra_roles get an adapter each.
    """
    torch.manual_seed(seed_for(blueprint.seed, "adapters"))
    sources = {
        "reference": blueprint.reference,
        "policy": blueprint.reference,
        "critic": blueprint.reward or blueprint.reference,
        "reward": blueprint.reward,
    }
    if blueprint.reward is None:
        del sources["reward"]
    trunk = Trunk(load_base(blueprint.model), blueprint.policy, (*sources, *extra_roles))
    for role, weights in sources.items():
        if weights is not None:
            trunk.write_adapter(role, weights)
    device = trunk.causal.device
    if blueprint.reward_head is None:
        return Roles(trunk, ScalarHead.zeros(trunk.width).to(device), None)
    heads = [ScalarHead.zeros(trunk.width).to(device) for _ in range(2)]
    for head in heads:
        head.load_state_dict(dict(blueprint.reward_head))
    return Roles(trunk, *heads)
