"""From what was generated and scored to what the learner trains on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.algorithms.advantages import gae, grpo, rewards_to_go, rloo, scale_rewards, token_rewards, whiten
from align.algorithms.kl import estimate_kl
from align.config.schema import PpoSettings
from rollouts.trajectory import RoleOutputs, Trajectory

Rows = list[Tensor]
"""One tensor a response, of its true length."""


@dataclass(frozen=True)
class Episode:
    """One response of T tokens with its targets. Tensors are `[T]` float32, on the CPU, of true length.

    old_logprobs, reference_logprobs: nats. advantages: whitened over the batch if the settings say so, and then times
    the truncated importance weights: the policy loss is homogeneous in them, so they weigh it.
    returns, old_values: in the reward's unit, never whitened; empty without a critic.
    weight: of each token in the mean that every loss is.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor
    weight: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


def make_episodes(
    trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], ppo: PpoSettings, coefficient: float
) -> list[Episode]:
    """Advantages and returns of a whole batch; the responses of a prompt stand side by side.

    `coefficient` weighs the KL that is part of the reward.
    """
    lengths = [trajectory.length for trajectory in trajectories]
    beta = coefficient if ppo.kl.where == "reward" else 0.0
    rewards = [_rewards(t, s, ppo, beta) for t, s in zip(trajectories, scored, strict=True)]
    if ppo.whiten_rewards:
        rewards = list(scale_rewards(torch.cat(rewards)).split(lengths))
    values = [_values(t, s, ppo) for t, s in zip(trajectories, scored, strict=True)]
    advantages, returns = ESTIMATORS[ppo.estimator](rewards, values, ppo)
    if ppo.whitens_advantages:
        advantages = list(whiten(torch.cat(advantages)).split(lengths))
    if ppo.importance_ratio_cap:
        for i, (t, s) in enumerate(zip(trajectories, scored, strict=True)):
            advantages[i] = advantages[i] * importance_weights(s.logprobs, t.sampler_logprobs, ppo.importance_ratio_cap)
    return [
        Episode(
            prompt_ids=trajectory.request.prompt_ids,
            response_ids=trajectory.response_ids,
            old_logprobs=score.logprobs,
            reference_logprobs=score.reference_logprobs,
            advantages=advantages[i],
            returns=returns[i],
            old_values=score.values[:-1],
            weight=1.0 if ppo.loss_aggregation == "token_mean" else 1.0 / trajectory.length,
        )
        for i, (trajectory, score) in enumerate(zip(trajectories, scored, strict=True))
    ]


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(π_learner / π_sampler, cap) of each token, `[T]`: corrects for what the sampler computes differently."""
    return torch.exp(logprobs - sampler_logprobs).clamp(max=cap)


def shaped_score(score: float, length: int, cut: bool, ppo: PpoSettings) -> float:
    """The score of a response less what its length and a missing end cost."""
    return score - ppo.length_penalty * length - (ppo.truncation_penalty if cut else 0.0)


def _is_bootstrapped(trajectory: Trajectory, ppo: PpoSettings) -> bool:
    return not trajectory.ended and ppo.on_truncation == "bootstrap"


def _rewards(trajectory: Trajectory, scored: RoleOutputs, ppo: PpoSettings, beta: float) -> Tensor:
    score = shaped_score(scored.score, trajectory.length, not trajectory.ended, ppo)
    kl = estimate_kl(scored.logprobs, scored.reference_logprobs, ppo.kl.estimator)
    return token_rewards(0.0 if _is_bootstrapped(trajectory, ppo) else score, kl, beta)


def _values(trajectory: Trajectory, scored: RoleOutputs, ppo: PpoSettings) -> Tensor:
    """The critic's values, the last one 0 where the response is terminal."""
    values = scored.values.clone()
    if len(values) and not _is_bootstrapped(trajectory, ppo):
        values[-1] = 0.0
    return values


def _by_gae(rewards: Rows, values: Rows, ppo: PpoSettings) -> tuple[Rows, Rows]:
    pairs = [gae(r, v, ppo.gamma, ppo.gae_lambda) for r, v in zip(rewards, values, strict=True)]
    return [advantages for advantages, _ in pairs], [returns for _, returns in pairs]


def _by_totals(function: Callable[[Tensor, int], Tensor]) -> Callable[[Rows, Rows, PpoSettings], tuple[Rows, Rows]]:
    """An estimator that gives all tokens of a response the same advantage, from its total reward."""

    def estimate(rewards: Rows, values: Rows, ppo: PpoSettings) -> tuple[Rows, Rows]:
        advantages = function(torch.stack([row.sum() for row in rewards]), ppo.samples_per_prompt)
        return [a.expand(len(r)) for a, r in zip(advantages, rewards, strict=True)], values

    return estimate


def _by_rewards_to_go(rewards: Rows, values: Rows, ppo: PpoSettings) -> tuple[Rows, Rows]:
    return [rewards_to_go(row, ppo.gamma) for row in rewards], values


ESTIMATORS: dict[str, Callable[[Rows, Rows, PpoSettings], tuple[Rows, Rows]]] = {
    "gae": _by_gae,
    "rloo": _by_totals(rloo),
    "grpo": _by_totals(grpo),
    "reinforce++": _by_rewards_to_go,
}
"""Advantages and returns from token rewards and values. Without a critic values are empty, and so are returns."""
