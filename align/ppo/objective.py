"""The objectives of a PPO update, as functions of the roles and one microbatch (see `MicrobatchObjective`).

Shapes: B sequences and P response tokens of a microbatch, N packed tokens (prompts and responses), H hidden size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.algorithms.episodes import Episode
from align.algorithms.kl import estimate_kl
from align.algorithms.losses import PolicyLoss, clipped_value_loss
from align.config.ppo_settings import PpoSettings
from align.learner.rank import MicrobatchObjective
from align.ppo.episode_shards import StoredEpisode
from align.roles.roles import Critic, Roles
from policies.batching import Batch, collate
from policies.logprobs import token_logprobs_and_entropy

STATISTICS = (
    "policy_loss",
    "value_loss",
    "kl_loss",
    "entropy",
    "approximate_kl",
    "policy_clipped",
    "value_clipped",
    "ratio_change",
    "squared_ratio_change",
)
"""Names of the sums that PPO's objectives return, in order; 0 where an objective has no such term. The change of the
ratio is ρ - 1 with ρ = π/π_old."""

MAXIMA = ("ratio_max",)
"""Names of the maxima that follow the sums; 0 where an objective has no such term."""


@dataclass(frozen=True)
class Targets:
    """The targets of a microbatch, each `[P]` float32 (see `Episode`).

    Without a critic `returns` and `old_values` are empty.
    """

    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weights: Tensor


def collate_episodes(stored: Sequence[Episode | StoredEpisode], device: torch.device) -> tuple[Batch, Targets]:
    """Load episodes and collate them into the tensors of one forward pass."""
    episodes = [episode.load() for episode in stored]
    prompts = [episode.prompt_ids for episode in episodes]
    responses = [episode.response_ids for episode in episodes]

    def cat(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(parts)).to(device)  # [T] of each -> [P]

    targets = Targets(
        old_logprobs=cat(episode.old_logprobs for episode in episodes),
        reference_logprobs=cat(episode.reference_logprobs for episode in episodes),
        advantages=cat(episode.advantages for episode in episodes),
        returns=cat(episode.returns for episode in episodes),
        old_values=cat(episode.old_values for episode in episodes),
        weights=cat(episode.token_weights for episode in episodes),
    )
    return collate(prompts, responses).to(device), targets


def ppo_objectives(
    roles: Roles, ppo: PpoSettings, policy_loss: PolicyLoss, temperature: float, kl_in_loss: float
) -> list[MicrobatchObjective]:
    """The objectives of one update, which are differentiated one after another.

    Their sum is policy loss + value loss + β·KL - entropy bonus. A critic with its own hidden states has its own
    objective, so that the activations of only one role are kept at a time.

    Args:
        roles: The roles that the update trains.
        ppo: The settings of PPO.
        policy_loss: The policy loss per token.
        temperature: Sampling temperature, by which logits are divided.
        kl_in_loss: β; 0 where the KL is in the reward.
    """
    objectives: list[MicrobatchObjective] = [
        partial(policy_objective, ppo=ppo, policy_loss=policy_loss, temperature=temperature, kl_in_loss=kl_in_loss)
    ]
    if roles.critic_trunk is not None:
        objectives.append(partial(critic_objective, ppo=ppo))
    return objectives


def summed(objectives: Sequence[MicrobatchObjective]) -> MicrobatchObjective:
    """The sum of objectives as one objective."""

    def objective(*microbatch: Any) -> tuple[Tensor, Tensor]:
        losses = []
        statistics = []
        for term in objectives:
            loss, sums = term(*microbatch)
            losses.append(loss)
            statistics.append(sums)
        # Of the objectives only one has a maximum that is not 0.
        return torch.stack(losses).sum(), torch.stack(statistics).sum(0)  # [], [10]

    return objective


def policy_objective(
    roles: Roles,
    batch: Batch,
    targets: Targets,
    ppo: PpoSettings,
    policy_loss: PolicyLoss,
    temperature: float,
    kl_in_loss: float,
) -> tuple[Tensor, Tensor]:
    """The objective of the policy, and of a critic that is a head on its hidden states; see `MicrobatchObjective`.

    The approximate KL is k3 of the old policy to the new one, from samples of the old one.
    """
    states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "policy")[batch.predictors]  # [N, H] -> [P, H]
    logprobs, entropy = token_logprobs_and_entropy(  # [P], [P]
        states,
        batch.response_ids,
        partial(roles.trunk.head, role="policy"),
        temperature,
        learn_entropy=ppo.entropy_coefficient > 0,
    )
    policy_losses, policy_clipped = policy_loss(logprobs, targets.old_logprobs, targets.advantages, ppo)  # [P], [P]
    kl_losses = kl_in_loss * estimate_kl(logprobs, targets.reference_logprobs, ppo.kl_estimator)  # [P]
    approximate_kl = estimate_kl(targets.old_logprobs, logprobs, "k3")  # [P]
    ratio_change = torch.expm1(logprobs - targets.old_logprobs)  # [P]
    value_losses = value_clipped = torch.zeros_like(policy_losses)  # [P]
    if roles.critic is not None and roles.critic_trunk is None:
        value_losses, value_clipped = _value_losses(roles.critic, states, targets, ppo)
    loss = policy_losses + ppo.critic.weight * value_losses + kl_losses - ppo.entropy_coefficient * entropy  # [P]
    statistics = torch.stack(
        [
            policy_losses,
            value_losses,
            kl_losses,
            entropy,
            approximate_kl,
            policy_clipped,
            value_clipped,
            ratio_change,
            ratio_change.square(),
        ]
    ).detach()  # [9, P]
    of_policy = ratio_change.detach().masked_fill(targets.weights == 0, -1.0)  # [P]; others have no ratio
    ratio_max = 1 + of_policy.amax(0, keepdim=True)  # [1]
    return loss @ targets.weights, torch.cat([statistics @ targets.weights, ratio_max])  # [], [10]


def critic_objective(roles: Roles, batch: Batch, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    """The objective of a critic that has its own hidden states; see `MicrobatchObjective`.

    Raises:
        ValueError: There is no such critic.
    """
    critic = roles.critic
    trunk = roles.critic_trunk
    if trunk is None or critic is None:
        raise ValueError("there is no critic with its own hidden states")
    states = trunk.hidden_packed(batch.ids, batch.lengths, "critic")[batch.predictors]  # [N, H] -> [P, H]
    value_losses, value_clipped = _value_losses(critic, states, targets, ppo)  # [P], [P]
    zeros = torch.zeros_like(value_losses)
    statistics = torch.stack(
        [zeros, value_losses, zeros, zeros, zeros, zeros, value_clipped, zeros, zeros, zeros]
    ).detach()  # [10, P]
    return ppo.critic.weight * value_losses @ targets.weights, statistics @ targets.weights  # [], [10]


def _value_losses(critic: Critic, states: Tensor, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    """The value loss of each token and whether its clip is active, both `[P]`, from hidden states `[P, H]`."""
    return clipped_value_loss(critic.head(states), targets.old_values, targets.returns, ppo.critic.value_clip)
