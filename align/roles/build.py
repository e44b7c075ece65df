"""From the products of the earlier stages to the learner's four roles."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from align.config.schema import CriticSettings
from align.roles.roles import Critic, Roles
from align.runtime.seeds import seed_for
from policies.heads import ScalarHead
from policies.methods.build import build_trunk
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rewards.model import role_of


@dataclass(frozen=True)
class RewardRole:
    """A reward model's adapter and heads, that of the whole score first."""

    adapter: AdapterWeights
    heads: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class Blueprint:
    """All that a process needs to build the roles; it travels to the learner's ranks.

    reference: the SFT adapter, or None: the base as it is. rewards: the members of the reward model on the trunk, none
    where the reward is something else.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    reference: AdapterWeights | None
    rewards: tuple[RewardRole, ...] = ()


def build_roles(blueprint: Blueprint, critic: CriticSettings | None, extra_roles: tuple[str, ...] = ()) -> Roles:
    """Policy and reference start from the SFT adapter; the critic, adapter and head, from the reward model.

    Of an ensemble it is the first. Without a reward model on the trunk the critic starts from the SFT adapter and says
    0, the mean of a normalised reward. Without an SFT adapter those that would start from it start from nothing.
    A critic that is a head on the policy, or a model of another base, says 0 too. extra_roles get an adapter each.
    """
    torch.manual_seed(seed_for(blueprint.seed, "adapters"))
    sources = {"reference": blueprint.reference, "policy": blueprint.reference}
    if critic is not None and critic.kind == "adapter":
        sources["critic"] = blueprint.rewards[0].adapter if blueprint.rewards else blueprint.reference
    sources |= {role_of(member): reward.adapter for member, reward in enumerate(blueprint.rewards)}
    trunk = build_trunk(blueprint.model, blueprint.policy, (*sources, *extra_roles))
    trunk.initialise(*(role for role, weights in sources.items() if weights is None))
    for role, weights in sources.items():
        if weights is not None:
            trunk.write_adapter(role, weights)
    rewards = {
        role_of(member): [_head(trunk, weights) for weights in reward.heads]
        for member, reward in enumerate(blueprint.rewards)
    }
    return Roles(trunk, None if critic is None else _critic(blueprint, critic, trunk), rewards)


def _critic(blueprint: Blueprint, settings: CriticSettings, trunk: Trunk) -> Critic:
    reward = blueprint.rewards[0] if blueprint.rewards else None
    head = None if reward is None else reward.heads[0]
    if settings.kind == "head":
        return Critic(_head(trunk, None), "policy")
    if settings.kind == "adapter":
        return Critic(_head(trunk, head), "critic")
    base = blueprint.model if settings.model is None else blueprint.model.model_copy(update={"path": settings.model})
    own = build_trunk(base, blueprint.policy, ("critic",))
    if settings.model is not None:
        return Critic(_head(own, None), "critic", own)
    if weights := blueprint.reference if reward is None else reward.adapter:
        own.write_adapter("critic", weights)
    return Critic(_head(own, head), "critic", own)


def _head(trunk: Trunk, weights: Mapping[str, Tensor] | None) -> ScalarHead:
    """A head for a trunk's states; without weights it says 0."""
    head = ScalarHead.zeros(trunk.width).to(trunk.causal.device)
    if weights is not None:
        head.load_state_dict(dict(weights))
    return head
