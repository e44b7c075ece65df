"""The losses of an update, as functions of the roles and one microbatch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.algorithms.episodes import Episode
from align.algorithms.kl import estimate_kl
from align.algorithms.losses import clipped_policy_loss, clipped_value_loss
from align.config.schema import PpoSettings
from align.roles.roles import Critic, Roles
from policies.batching import Batch, collate
from policies.logprobs import token_logprobs_and_entropy


@dataclass(frozen=True)
class Targets:
    """A microbatch's targets, each `[P]` float32 (see `Episode`); returns and old_values are empty without a critic."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weights: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode], device: torch.device) -> "Targets":
        names = ("old_logprobs", "reference_logprobs", "advantages", "returns", "old_values")
        columns = [torch.cat([getattr(e, name) for e in episodes]) for name in names]
        columns.append(torch.cat([torch.full((len(e.response_ids),), e.weight) for e in episodes]))
        return cls(*(column.to(device) for column in columns))


def microbatch(episodes: list[Episode], device: torch.device) -> tuple[Batch, Targets]:
    """Episodes as the tensors of one forward pass."""
    batch = collate([e.prompt_ids for e in episodes], [e.response_ids for e in episodes])
    return batch.to(device), Targets.of(episodes, device)


STATISTICS = ("policy_loss", "value_loss", "kl_loss", "entropy", "approximate_kl", "policy_clipped", "value_clipped")
"""Names of the sums that a loss returns, in order; 0 where it has nothing to say of one."""

Loss = Callable[..., tuple[Tensor, Tensor]]
"""Of roles, batch and what else it needs: the loss summed over the tokens of a microbatch, each by its weight, and its
statistics, sums too: PPO's are `[7]` (see `STATISTICS`)."""


def ppo_losses(roles: Roles, ppo: PpoSettings, temperature: float, kl_in_loss: float) -> list[Loss]:
    """The losses of one update, which are differentiated one after the other.

    Together they are policy + value + β·KL - entropy bonus; `kl_in_loss` is β, 0 where the KL is in the reward. Where
    the critic has states of its own it has a loss of its own, so that one role's activations are kept at a time.
    """
    of_policy = partial(policy_loss, ppo=ppo, temperature=temperature, kl_in_loss=kl_in_loss)
    return [of_policy] if roles.critic_trunk is None else [of_policy, partial(value_loss, ppo=ppo)]


def in_one(losses: Sequence[Loss]) -> Loss:
    """Their sum as one loss."""

    def loss_of(*given: Any) -> tuple[Tensor, Tensor]:
        made = [loss(*given) for loss in losses]
        return torch.stack([loss for loss, _ in made]).sum(), torch.stack([parts for _, parts in made]).sum(0)

    return loss_of


def policy_loss(
    roles: Roles, batch: Batch, targets: Targets, ppo: PpoSettings, temperature: float, kl_in_loss: float
) -> tuple[Tensor, Tensor]:
    """The loss of the policy, and of a critic that is a head on its states; see `Loss`.

    The approximate KL is k3 of the old policy to the new, from samples of the old.
    """
    states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "policy")[batch.predictors]
    head = partial(roles.trunk.head, role="policy")
    logprobs, entropy = token_logprobs_and_entropy(
        states, batch.response_ids, head, temperature, learn_entropy=ppo.entropy_coefficient > 0
    )
    policy, policy_clipped = clipped_policy_loss(
        logprobs, targets.old_logprobs, targets.advantages, ppo.clip_low, ppo.clip_high, ppo.dual_clip or math.inf
    )
    kl = kl_in_loss * estimate_kl(logprobs, targets.reference_logprobs, ppo.kl.estimator)
    moved = estimate_kl(targets.old_logprobs, logprobs, "k3")
    value = value_clipped = torch.zeros_like(policy)
    if roles.critic is not None and roles.critic_trunk is None:
        value, value_clipped = _value_loss(roles.critic, states, targets, ppo)
    loss = policy + ppo.critic.weight * value + kl - ppo.entropy_coefficient * entropy
    parts = torch.stack([policy, value, kl, entropy, moved, policy_clipped, value_clipped]).detach()
    return loss @ targets.weights, parts @ targets.weights


def value_loss(roles: Roles, batch: Batch, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    """The loss of a critic that has states of its own; see `Loss`. Raises ValueError where there is none."""
    trunk, critic = roles.critic_trunk, roles.critic
    if trunk is None or critic is None:
        raise ValueError("there is no critic with states of its own")
    states = trunk.hidden_packed(batch.ids, batch.lengths, "critic")[batch.predictors]
    value, clipped = _value_loss(critic, states, targets, ppo)
    nothing = torch.zeros_like(value)
    parts = torch.stack([nothing, value, nothing, nothing, nothing, nothing, clipped]).detach()
    return ppo.critic.weight * value @ targets.weights, parts @ targets.weights


def _value_loss(critic: Critic, states: Tensor, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    return clipped_value_loss(critic.head(states), targets.old_values, targets.returns, ppo.critic.value_clip)


def likelihood_loss(roles: Roles, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of demonstrations under the policy, in nats, summed over response tokens; twice, the
    second time without a gradient."""
    states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "policy")
    loss = -roles.logprobs("policy", states, batch, temperature=1.0).sum()
    return loss, loss.detach()
