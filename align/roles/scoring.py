"""The learner's forward passes: scoring by four roles, and the losses, as functions of one module."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
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
from policies.logprobs import shortfalls, token_logprobs_and_entropy
from rollouts.trajectory import Scored, Trajectory

EVERY_ROLE = ("policy", "reference", "critic", "reward")
"""Who is asked to score; a critic only together with the policy, whose states it may read."""
GREEDY = "greedy"
"""What may be asked besides: the policy's, how much less likely each token is than the likeliest."""


@dataclass(frozen=True)
class Verdicts:
    """What four roles say of a batch: P response tokens of B rows, float32. None: was not asked, or is not there.

    logprobs, reference_logprobs: `[P]`. values: `[P]`, before each token; last_values: `[B]`, after each row's last.
    outputs: `[B, C]`, of the reward heads. shortfalls: `[P]`, see `Scored`.
    """

    logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    last_values: Tensor | None
    outputs: Tensor | None
    shortfalls: Tensor | None


def judge(roles: Roles, batch: Batch, temperature: float, asked: Collection[str]) -> Verdicts:
    """Score a batch by the roles that are asked: one forward pass each, but for a critic that is a head."""
    trunk = roles.trunk
    logprobs = reference_logprobs = values = last_values = outputs = short = None
    if "policy" in asked:
        states = trunk.hidden_of_rows(batch.ids, batch.rows, "policy")
        logprobs = roles.logprobs("policy", states, batch, temperature)
        if roles.critic is not None and "critic" in asked:
            states = roles.critic_states(batch, states)
            values, last_values = roles.critic.head(states[batch.before]), roles.critic.head(states[batch.last])
    if "reference" in asked:
        states = trunk.hidden_of_rows(batch.ids, batch.rows, "reference")
        reference_logprobs = roles.logprobs("reference", states, batch, temperature)
    if roles.reward_heads and "reward" in asked:
        outputs = roles.reward_outputs(batch)
    if GREEDY in asked:
        states = trunk.hidden_of_rows(batch.ids, batch.rows, "policy")
        short = shortfalls(states[batch.before], batch.tokens, partial(trunk.head, role="policy"))
    return Verdicts(logprobs, reference_logprobs, values, last_values, outputs, short)


def score_group(
    run: Callable[..., Any],
    rows: Sequence[Trajectory],
    temperature: float,
    device: torch.device,
    asked: Collection[str] = EVERY_ROLE,
) -> list[Scored]:
    """Score trajectories in one padded batch. `run` is `Roles`, or what wraps it."""
    batch = collate([t.request.prompt_ids for t in rows], [t.response_ids for t in rows]).to(device)
    verdicts: Verdicts = run(judge, batch, temperature, asked)
    nothing: Sequence[Tensor] = [torch.empty(0)] * len(rows)
    logprobs, references, before, short = (
        nothing if part is None else batch.split(part.cpu())
        for part in (verdicts.logprobs, verdicts.reference_logprobs, verdicts.values, verdicts.shortfalls)
    )
    after = nothing if verdicts.last_values is None else verdicts.last_values.cpu().split(1)
    values = [torch.cat(pair) for pair in zip(before, after, strict=True)]
    outputs = nothing if verdicts.outputs is None else verdicts.outputs.cpu().unbind()
    first = [float(row[0]) if len(row) else math.nan for row in outputs]
    columns = zip(logprobs, references, values, first, outputs, short, strict=True)
    return [Scored(p, r, v, score, outputs=o, shortfalls=s) for p, r, v, score, o, s in columns]


def score_groups(
    run: Callable[..., Any],
    rows: Sequence[Trajectory],
    groups: Iterable[Sequence[int]],
    temperature: float,
    device: torch.device,
    asked: Collection[str] = EVERY_ROLE,
) -> list[Scored]:
    """Score trajectories, each group of indices in one pass. Where a row is in two groups the first one counts."""
    scored: dict[int, Scored] = {}
    for group in groups:
        verdicts = score_group(run, [rows[i] for i in group], temperature, device, asked)
        for i, verdict in zip(group, verdicts, strict=True):
            scored.setdefault(i, verdict)
    return [scored[i] for i in range(len(rows))]


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
    states = roles.trunk.hidden_of_rows(batch.ids, batch.rows, "policy")[batch.before]
    head = partial(roles.trunk.head, role="policy")
    logprobs, entropy = token_logprobs_and_entropy(
        states, batch.tokens, head, temperature, learn_entropy=ppo.entropy > 0
    )
    policy, policy_clipped = clipped_policy_loss(
        logprobs, targets.old_logprobs, targets.advantages, ppo.clip_low, ppo.clip_high, ppo.dual_clip or math.inf
    )
    kl = kl_in_loss * estimate_kl(logprobs, targets.reference_logprobs, ppo.kl.estimator)
    moved = estimate_kl(targets.old_logprobs, logprobs, "k3")
    value = value_clipped = torch.zeros_like(policy)
    if roles.critic is not None and roles.critic_trunk is None:
        value, value_clipped = _value_loss(roles.critic, states, targets, ppo)
    loss = policy + ppo.critic.weight * value + kl - ppo.entropy * entropy
    parts = torch.stack([policy, value, kl, entropy, moved, policy_clipped, value_clipped]).detach()
    return loss @ targets.weights, parts @ targets.weights


def value_loss(roles: Roles, batch: Batch, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    """The loss of a critic that has states of its own; see `Loss`. Raises ValueError where there is none."""
    trunk, critic = roles.critic_trunk, roles.critic
    if trunk is None or critic is None:
        raise ValueError("there is no critic with states of its own")
    states = trunk.hidden_of_rows(batch.ids, batch.rows, "critic")[batch.before]
    value, clipped = _value_loss(critic, states, targets, ppo)
    nothing = torch.zeros_like(value)
    parts = torch.stack([nothing, value, nothing, nothing, nothing, nothing, clipped]).detach()
    return ppo.critic.weight * value @ targets.weights, parts @ targets.weights


def _value_loss(critic: Critic, states: Tensor, targets: Targets, ppo: PpoSettings) -> tuple[Tensor, Tensor]:
    return clipped_value_loss(critic.head(states), targets.old_values, targets.returns, ppo.critic.value_clip)


def likelihood_loss(roles: Roles, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of demonstrations under the policy, in nats, summed over response tokens; twice, the
    second time without a gradient."""
    states = roles.trunk.hidden_of_rows(batch.ids, batch.rows, "policy")
    loss = -roles.logprobs("policy", states, batch, temperature=1.0).sum()
    return loss, loss.detach()
