"""Builds the four roles of the learner from the products of the earlier stages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align.config.ppo_settings import CriticSettings
from align.roles.roles import Critic, Roles
from align.runtime.seeds import seed_for
from policies.build import build_trunk
from policies.heads import ScalarHead
from policies.scaling import widened
from policies.schema import ModelSettings, PolicySettings
from policies.trunk import AdapterWeights, Trunk
from rewards.model import role_of

SFT_ROLE = "reference"
"""The role of the SFT model in all stages."""


@dataclass(frozen=True)
class RewardRole:
    """A reward model on the shared base model: one member of the ensemble.

    Attributes:
        adapter: The member's adapter.
        heads: Weights of the member's heads: first of the overall score, then of each attribute.
    """

    adapter: AdapterWeights
    heads: tuple[Mapping[str, Tensor], ...]


@dataclass(frozen=True)
class Blueprint:
    """Everything that a process needs to build the roles. It is sent to the learner's ranks.

    Attributes:
        model: Settings of the base model.
        policy: Settings of the adapters.
        seed: Seed of the run.
        reference: The SFT adapter; None where the base model itself is the reference.
        rewards: The members of the reward model on the base model; empty where the reward comes from elsewhere.
        reads_tokens: Whether the reward model is a process reward model, which is read inside a response.
    """

    model: ModelSettings
    policy: PolicySettings
    seed: int
    reference: AdapterWeights | None
    rewards: tuple[RewardRole, ...] = ()
    reads_tokens: bool = False

    def widened(self, policy: PolicySettings) -> "Blueprint":
        """The same roles with adapters of the rank of other settings (see `policies.scaling.widened`)."""
        reference = None if self.reference is None else widened(self.reference, policy)
        rewards = tuple(replace(reward, adapter=widened(reward.adapter, policy)) for reward in self.rewards)
        return replace(self, policy=policy, reference=reference, rewards=rewards)


def build_sft_trunk(
    model: ModelSettings,
    policy: PolicySettings,
    seed: int,
    purpose: str,
    roles: Sequence[str] = (SFT_ROLE,),
    sft: AdapterWeights | None = None,
) -> Trunk:
    """Load the base model with an adapter for each of some roles, the first of which is the SFT model's.

    Args:
        model: Settings of the base model.
        policy: Settings of the adapters.
        seed: Seed of the run.
        purpose: What the trunk is for: it seeds the random initial weights.
        roles: The roles.
        sft: The SFT adapter; None: the base itself is the SFT model, and the adapter changes nothing.
    """
    torch.manual_seed(seed_for(seed, purpose, "adapters"))
    trunk = build_trunk(model, policy, tuple(roles))
    if sft:
        trunk.write_adapter(roles[0], sft)
    else:
        trunk.initialise(roles[0])
    return trunk


def build_roles(blueprint: Blueprint, critic: CriticSettings | None, extra_roles: tuple[str, ...] = ()) -> Roles:
    """Build the roles from a blueprint.

    The policy and the reference start from the SFT adapter, or from a new adapter where there is none. The adapter and
    the head of the critic start from the reward model (the first member of an ensemble). Without a reward model on the
    shared base model, the critic's adapter starts as the policy's, and its head outputs 0, the mean of a normalised
    reward; so does the head of a critic on the policy's states, on another base model, or beside a process reward
    model, whose scores are not returns.

    Args:
        blueprint: The models, adapters and heads of the roles.
        critic: Settings of the critic; None: no critic.
        extra_roles: Further roles, each with an adapter.

    Returns:
        The roles, on the default device.
    """
    torch.manual_seed(seed_for(blueprint.seed, "adapters"))
    sources = {"reference": blueprint.reference, "policy": blueprint.reference}
    if critic is not None and critic.kind == "adapter":
        sources["critic"] = blueprint.rewards[0].adapter if blueprint.rewards else blueprint.reference
    for member, reward in enumerate(blueprint.rewards):
        sources[role_of(member)] = reward.adapter
    trunk = build_trunk(blueprint.model, blueprint.policy, (*sources, *extra_roles))
    new_adapters = [role for role, weights in sources.items() if weights is None]
    trunk.initialise(*new_adapters)
    for role, weights in sources.items():
        if weights is not None:
            trunk.write_adapter(role, weights)
    reward_heads = {}
    for member, reward in enumerate(blueprint.rewards):
        reward_heads[role_of(member)] = [_build_head(trunk, weights) for weights in reward.heads]
    built_critic = None if critic is None else _build_critic(blueprint, critic, trunk)
    return Roles(trunk, built_critic, reward_heads, blueprint.reads_tokens)


def _build_critic(blueprint: Blueprint, settings: CriticSettings, trunk: Trunk) -> Critic:
    reward = blueprint.rewards[0] if blueprint.rewards else None
    head = None if reward is None or blueprint.reads_tokens else reward.heads[0]
    if settings.kind == "head":
        return Critic(_build_head(trunk, None), "policy")
    if settings.kind == "adapter":
        return Critic(_build_head(trunk, head), "critic")
    if settings.model is not None:
        model = blueprint.model.model_copy(update={"path": settings.model})
        other_trunk = build_trunk(model, blueprint.policy, ("critic",))
        return Critic(_build_head(other_trunk, None), "critic", other_trunk)
    critic_trunk = build_trunk(blueprint.model, blueprint.policy, ("critic",))
    adapter = blueprint.reference if reward is None else reward.adapter
    if adapter:
        critic_trunk.write_adapter("critic", adapter)
    return Critic(_build_head(critic_trunk, head), "critic", critic_trunk)


def _build_head(trunk: Trunk, weights: Mapping[str, Tensor] | None) -> ScalarHead:
    """A scalar head on the states of a trunk; without weights it outputs 0."""
    head = ScalarHead.zeros(trunk.width).to(trunk.causal.device)
    if weights is not None:
        head.load_state_dict(dict(weights))
    return head
