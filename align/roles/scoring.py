"""Forward passes of the four roles, without gradients: what each outputs for a batch of trajectories."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.roles.roles import Roles
from policies.batching import Batch, collate
from policies.logprobs import shortfalls
from rollouts.trajectory import RoleOutputs, Trajectory

ALL_ROLES = ("policy", "reference", "critic", "reward")
"""Who is asked to score; a critic only together with the policy, whose states it may read."""
GREEDY = "greedy"
"""What may be asked besides: the policy's, how much less likely each token is than the likeliest."""


@dataclass(frozen=True)
class BatchOutputs:
    """What four roles say of a batch: P response tokens of B rows, float32. None: was not asked, or is not there.

    logprobs, reference_logprobs: `[P]`. values: `[P]`, before each token; last_values: `[B]`, after each row's last.
    reward_outputs: `[B, C]`, of the reward heads. shortfalls: `[P]`, see `RoleOutputs`.
    """

    logprobs: Tensor | None
    reference_logprobs: Tensor | None
    values: Tensor | None
    last_values: Tensor | None
    reward_outputs: Tensor | None
    shortfalls: Tensor | None


def forward_roles(roles: Roles, batch: Batch, temperature: float, requested_roles: Collection[str]) -> BatchOutputs:
    """Score a batch by the roles that are asked: one forward pass each, but for a critic that is a head."""
    trunk = roles.trunk
    logprobs = reference_logprobs = values = last_values = outputs = short = None
    if "policy" in requested_roles:
        states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
        logprobs = roles.logprobs("policy", states, batch, temperature)
        if roles.critic is not None and "critic" in requested_roles:
            states = roles.critic_states(batch, states)
            values, last_values = roles.critic.head(states[batch.predictors]), roles.critic.head(states[batch.last])
    if "reference" in requested_roles:
        states = trunk.hidden_packed(batch.ids, batch.lengths, "reference")
        reference_logprobs = roles.logprobs("reference", states, batch, temperature)
    if roles.reward_heads and "reward" in requested_roles:
        outputs = roles.reward_outputs(batch)
    if GREEDY in requested_roles:
        states = trunk.hidden_packed(batch.ids, batch.lengths, "policy")
        short = shortfalls(states[batch.predictors], batch.response_ids, partial(trunk.head, role="policy"))
    return BatchOutputs(logprobs, reference_logprobs, values, last_values, outputs, short)


def score_microbatch(
    run: Callable[..., Any],
    trajectories: Sequence[Trajectory],
    temperature: float,
    device: torch.device,
    requested_roles: Collection[str] = ALL_ROLES,
) -> list[RoleOutputs]:
    """Score trajectories in one packed forward pass per role. `run` is `Roles`, or what wraps it."""
    prompts = [trajectory.request.prompt_ids for trajectory in trajectories]
    responses = [trajectory.response_ids for trajectory in trajectories]
    batch = collate(prompts, responses).to(device)
    outputs: BatchOutputs = run(forward_roles, batch, temperature, requested_roles)
    empty: Sequence[Tensor] = [torch.empty(0)] * len(trajectories)

    def per_response(flat: Tensor | None) -> Sequence[Tensor]:
        return empty if flat is None else batch.split(flat.cpu())

    def per_row(rows: Tensor | None) -> Sequence[Tensor]:
        return empty if rows is None else rows.cpu().unbind()

    logprobs = per_response(outputs.logprobs)
    reference_logprobs = per_response(outputs.reference_logprobs)
    shortfalls = per_response(outputs.shortfalls)
    values = per_response(outputs.values)
    last_values = empty if outputs.last_values is None else outputs.last_values.cpu().split(1)
    reward_outputs = per_row(outputs.reward_outputs)
    return [
        RoleOutputs(
            logprobs=logprobs[i],
            reference_logprobs=reference_logprobs[i],
            values=torch.cat([values[i], last_values[i]]),
            score=float(reward_outputs[i][0]) if len(reward_outputs[i]) else math.nan,
            reward_outputs=reward_outputs[i],
            shortfalls=shortfalls[i],
        )
        for i in range(len(trajectories))
    ]


def score_microbatches(
    run: Callable[..., Any],
    rows: Sequence[Trajectory],
    groups: Iterable[Sequence[int]],
    temperature: float,
    device: torch.device,
    requested_roles: Collection[str] = ALL_ROLES,
) -> list[RoleOutputs]:
    """Score trajectories, each group of indices in one pass. Where a row is in two groups the first one counts."""
    scored: dict[int, RoleOutputs] = {}
    for group in groups:
        outputs = score_microbatch(run, [rows[i] for i in group], temperature, device, requested_roles)
        for i, output in zip(group, outputs, strict=True):
            scored.setdefault(i, output)
    return [scored[i] for i in range(len(rows))]
