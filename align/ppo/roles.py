"""The learner's forward passes: scoring by four roles, and PPO's loss, as functions of one module."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from align.ppo.episodes import Episode
from align.ppo.kl import estimate_kl
from align.ppo.losses import clipped_policy_loss, clipped_value_loss
from align.schema import PpoSettings
from policies.batching import Batch, collate
from policies.heads import ScalarHead
from policies.logprobs import token_logprobs
from policies.trunk import Trunk
from rollouts.trajectory import Scored, Trajectory


class Roles(nn.Module):
    """The trunk and its heads: all that the learner holds, and what DeepSpeed wraps.

    `forward` runs a function of this module, so that every pass over the weights, whatever it computes, is under
    DeepSpeed's hooks, which gather sharded parameters.
    """

    def __init__(self, trunk: Trunk, critic_head: ScalarHead, reward_head: ScalarHead | None) -> None:
        super().__init__()
        self.trunk = trunk
        self.critic_head = critic_head
        self.reward_head = reward_head
        trunk.train_only("policy", "critic")
        if reward_head is not None:
            reward_head.requires_grad_(False)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self, *arguments)


@dataclass(frozen=True)
class Verdicts:
    """What four roles say of a batch: P response tokens of B rows, float32.

    logprobs, reference_logprobs: `[P]`. values: `[P]`, before each token; last_values: `[B]`, after each row's last.
    scores: `[B]`, or None where the reward is not on the trunk.
    """

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    last_values: Tensor
    scores: Tensor | None


def judge(roles: Roles, batch: Batch, temperature: float) -> Verdicts:
    """Score a batch by policy, reference, critic and reward: one forward pass over the trunk each."""
    trunk = roles.trunk

    def logprobs(role: str) -> Tensor:
        states = trunk.hidden(batch.ids, role).flatten(0, 1)
        return token_logprobs(states[batch.before], batch.tokens, trunk.head, temperature)[0]

    critic = trunk.hidden(batch.ids, "critic").flatten(0, 1)
    scores = None
    if roles.reward_head is not None:
        scores = roles.reward_head(trunk.hidden(batch.ids, "reward").flatten(0, 1)[batch.last])
    return Verdicts(
        logprobs=logprobs("policy"),
        reference_logprobs=logprobs("reference"),
        values=roles.critic_head(critic[batch.before]),
        last_values=roles.critic_head(critic[batch.last]),
        scores=scores,
    )


def score_group(
    run: Callable[..., Any], rows: Sequence[Trajectory], temperature: float, device: torch.device
) -> list[Scored]:
    """Score trajectories in one padded batch. `run` is `Roles`, or what wraps it."""
    batch = collate([t.request.prompt_ids for t in rows], [t.response_ids for t in rows]).to(device)
    verdicts: Verdicts = run(judge, batch, temperature)
    parts = (verdicts.logprobs, verdicts.reference_logprobs, verdicts.values)
    logprobs, references, values = (batch.split(part.cpu()) for part in parts)
    after = verdicts.last_values.cpu().split(1)
    scores = [math.nan] * len(rows) if verdicts.scores is None else verdicts.scores.tolist()
    return [Scored(logprobs[i], references[i], torch.cat([values[i], after[i]]), scores[i]) for i in range(len(rows))]


def score_groups(
    run: Callable[..., Any],
    rows: Sequence[Trajectory],
    groups: Iterable[Sequence[int]],
    temperature: float,
    device: torch.device,
) -> list[Scored]:
    """Score trajectories, each group of indices in one pass. Where a row is in two groups the first one counts."""
    scored: dict[int, Scored] = {}
    for group in groups:
        verdicts = score_group(run, [rows[i] for i in group], temperature, device)
        scored = dict(zip(group, verdicts, strict=True)) | scored
    return [scored[i] for i in range(len(rows))]


@dataclass(frozen=True)
class Targets:
    """A microbatch's targets, each `[P]` float32 (see `Episode`)."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor

    @classmethod
    def of(cls, episodes: list[Episode], device: torch.device) -> "Targets":
        return cls(*(torch.cat([getattr(e, f.name) for e in episodes]).to(device) for f in fields(cls)))


def microbatch(episodes: list[Episode], device: torch.device) -> tuple[Batch, Targets]:
    """Episodes as the tensors of one forward pass."""
    batch = collate([e.prompt_ids for e in episodes], [e.response_ids for e in episodes])
    return batch.to(device), Targets.of(episodes, device)


STATISTICS = ("policy_loss", "value_loss", "kl_loss", "entropy", "approximate_kl", "policy_clipped", "value_clipped")
"""Names of the sums that `ppo_loss` returns, in order."""


def ppo_loss(
    roles: Roles, batch: Batch, targets: Targets, ppo: PpoSettings, temperature: float, kl_in_loss: float
) -> tuple[Tensor, Tensor]:
    """The loss summed over the tokens of a microbatch, and its statistics `[7]`, sums too (see `STATISTICS`).

    policy + value + β·KL - entropy bonus; the policy's parameters see no gradient of the value loss, nor the critic's
    of the others, since each has its own adapter. `kl_in_loss` is β, 0 where the KL is in the reward.
    The approximate KL is k3 of the old policy to the new, from samples of the old.
    """
    trunk = roles.trunk
    states = trunk.hidden(batch.ids, "policy").flatten(0, 1)
    logprobs, entropy = token_logprobs(states[batch.before], batch.tokens, trunk.head, temperature)
    critic = trunk.hidden(batch.ids, "critic").flatten(0, 1)
    values = roles.critic_head(critic[batch.before])

    policy, policy_clipped = clipped_policy_loss(
        logprobs, targets.old_logprobs, targets.advantages, ppo.clip_low, ppo.clip_high
    )
    value, value_clipped = clipped_value_loss(values, targets.old_values, targets.returns, ppo.value_clip)
    kl = estimate_kl(logprobs, targets.reference_logprobs, ppo.kl.estimator)
    moved = estimate_kl(targets.old_logprobs, logprobs, "k3")

    loss = policy.sum() + value.sum() + kl_in_loss * kl.sum() - ppo.entropy * entropy.sum()
    parts = (policy, value, kl_in_loss * kl, entropy, moved, policy_clipped, value_clipped)
    return loss, torch.stack([part.detach().sum() for part in parts])
