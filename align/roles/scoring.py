"""Forward passes of the four roles, and their outputs for a batch of trajectories.

Shapes: B sequences of a batch, N their packed tokens, P their response tokens, H hidden size, C reward heads.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.roles.roles import Roles
from policies.batching import Batch, collate
from policies.logprobs import shortfalls
from rollouts.trajectory import RoleOutputs, ScoredTokens, Trajectory, policy_mask

ALL_ROLES = ("policy", "reference", "critic", "reward")
"""The roles that score by default. The critic can be requested only with the policy, whose states it may read."""
GREEDY = "greedy"
"""A further request: how much less likely each token is under the policy than the likeliest one (`shortfalls`), and the
spacing of its logits (`logit_spacings`)."""


@dataclass(frozen=True)
class BatchOutputs:
    """The outputs of the roles for a batch, float32. None: the role was not requested, or does not exist.

    Attributes:
        logprobs: `[P]`, log-probabilities of the response tokens under the policy, in nats.
        reference_logprobs: `[P]`, the same under the reference.
        values: `[P]`, the critic's values before each response token.
        last_values: `[B]`, the critic's values after the last token of each response.
        reward_outputs: `[B, C]`, outputs of the reward heads.
        token_scores: `[P]`, outputs of the head of a process reward model at each response token.
        shortfalls: `[P]`, see `RoleOutputs`.
        logit_spacings: `[P]`, see `RoleOutputs`.
    """

    logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    last_values: Tensor | None = None
    reward_outputs: Tensor | None = None
    token_scores: Tensor | None = None
    shortfalls: Tensor | None = None
    logit_spacings: Tensor | None = None


def forward_roles(roles: Roles, batch: Batch, temperature: float, requested_roles: Collection[str]) -> BatchOutputs:
    """Compute the outputs of the requested roles: one forward pass each, none for a critic that is a head.

    Args:
        roles: The four roles.
        batch: The packed prompts and responses.
        temperature: Sampling temperature, by which logits are divided.
        requested_roles: Some of `ALL_ROLES` and `GREEDY`.
    """
    outputs: dict[str, Tensor] = {}
    if "policy" in requested_roles:
        outputs |= _policy_outputs(roles, batch, temperature, with_critic="critic" in requested_roles)
    if "reference" in requested_roles:
        states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "reference")  # [N, H]
        outputs["reference_logprobs"] = roles.logprobs("reference", states, batch, temperature)
    if "reward" in requested_roles and roles.reward_heads:
        if roles.reads_tokens:
            outputs["token_scores"] = roles.token_scores(batch)
        else:
            outputs["reward_outputs"] = roles.reward_outputs(batch)
    if GREEDY in requested_roles:
        states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "policy")[batch.predictors]  # [N, H] -> [P, H]
        head = partial(roles.trunk.head, role="policy")
        outputs["shortfalls"], outputs["logit_spacings"] = shortfalls(states, batch.response_ids, head)
    return BatchOutputs(**outputs)


def _policy_outputs(roles: Roles, batch: Batch, temperature: float, with_critic: bool) -> dict[str, Tensor]:
    states = roles.trunk.hidden_packed(batch.ids, batch.lengths, "policy")  # [N, H]
    outputs = {"logprobs": roles.logprobs("policy", states, batch, temperature)}
    if with_critic and roles.critic is not None:
        states = roles.critic_states(batch, states)  # [N, H]
        outputs["values"] = roles.critic.head(states[batch.predictors])  # [P]
        outputs["last_values"] = roles.critic.head(states[batch.last])  # [B]
    return outputs


def score_microbatch(
    run: Callable[..., Any],
    trajectories: Sequence[ScoredTokens],
    temperature: float,
    device: torch.device,
    requested_roles: Collection[str] = ALL_ROLES,
) -> list[RoleOutputs]:
    """Compute the outputs of the requested roles in one packed forward pass per role.

    Args:
        run: Calls a function with the roles and its arguments: `Roles` itself, or the engine that wraps it.
        trajectories: `[B]`.
        temperature: Sampling temperature, by which logits are divided.
        device: The device of the roles.
        requested_roles: Some of `ALL_ROLES` and `GREEDY`.

    Returns:
        One record per trajectory, in the same order.
    """
    prompts = [trajectory.prompt_ids for trajectory in trajectories]
    responses = [trajectory.response_ids for trajectory in trajectories]
    batch = collate(prompts, responses).to(device)
    outputs: BatchOutputs = run(forward_roles, batch, temperature, requested_roles)
    return _by_trajectory(outputs, batch)


def _by_trajectory(outputs: BatchOutputs, batch: Batch) -> list[RoleOutputs]:
    """The outputs of a batch as one record per trajectory, on the CPU.

    The tensors are clones, because a view drags the whole batch along when a rank sends it.
    """
    count = len(batch.response_lengths)
    empty: list[Tensor] = [torch.empty(0)] * count

    def per_token(flat: Tensor | None) -> Sequence[Tensor]:
        return empty if flat is None else batch.split(flat.cpu())  # [P] -> [T] of each

    logprobs = per_token(outputs.logprobs)
    reference_logprobs = per_token(outputs.reference_logprobs)
    shortfalls = per_token(outputs.shortfalls)
    logit_spacings = per_token(outputs.logit_spacings)
    token_scores = per_token(outputs.token_scores)
    values = per_token(outputs.values)
    last_values: Sequence[Tensor] = empty
    if outputs.last_values is not None:
        last_values = torch.split(outputs.last_values.cpu(), 1)  # [B] -> [1] of each
    reward_outputs: Sequence[Tensor] = empty
    if outputs.reward_outputs is not None:
        reward_outputs = outputs.reward_outputs.cpu().unbind()  # [B, C] -> [C] of each
    records = []
    for i in range(count):
        record = RoleOutputs(
            logprobs=logprobs[i].clone(),
            reference_logprobs=reference_logprobs[i].clone(),
            values=torch.cat([values[i], last_values[i]]),  # [T + 1], or empty
            score=float(reward_outputs[i][0]) if len(reward_outputs[i]) else math.nan,
            reward_outputs=reward_outputs[i].clone(),
            token_scores=token_scores[i].clone(),
            shortfalls=shortfalls[i].clone(),
            logit_spacings=logit_spacings[i].clone(),
        )
        records.append(record)
    return records


def with_given_tokens(trajectories: Sequence[Trajectory], outputs: Sequence[RoleOutputs]) -> list[RoleOutputs]:
    """The role outputs with the log-probability 0 for tokens that the policy has not sampled: they are given.

    Args:
        trajectories: `[B]`.
        outputs: `[B]`, their role outputs.
    """
    given: list[RoleOutputs] = []
    for trajectory, output in zip(trajectories, outputs, strict=True):
        if trajectory.inserted and len(output.logprobs):
            others = ~policy_mask(trajectory.length, trajectory.inserted)  # [T]
            output = replace(
                output,
                logprobs=output.logprobs.masked_fill(others, 0.0),
                reference_logprobs=output.reference_logprobs.masked_fill(others, 0.0),
            )
        given.append(output)
    return given


def score_microbatches(
    score: Callable[[Sequence[ScoredTokens]], Sequence[RoleOutputs]],
    trajectories: Sequence[ScoredTokens],
    microbatches: Iterable[Sequence[int]],
) -> list[RoleOutputs]:
    """Compute role outputs, microbatch by microbatch.

    Args:
        score: Gives one record per trajectory of a microbatch, in the same order; see `score_microbatch`.
        trajectories: The trajectories of all microbatches.
        microbatches: The indices of each microbatch's trajectories. Of a trajectory in several, the first counts.

    Returns:
        One record per trajectory, in the same order.
    """
    scored: dict[int, RoleOutputs] = {}
    for indices in microbatches:
        outputs = score([trajectories[i] for i in indices])
        for i, output in zip(indices, outputs, strict=True):
            scored.setdefault(i, output)
    return [scored[i] for i in range(len(trajectories))]
