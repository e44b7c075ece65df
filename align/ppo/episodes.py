"""From what was generated and scored to what the learner trains on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from align.ppo.advantages import gae, token_rewards, whiten
from align.ppo.kl import estimate_kl
from align.schema import PpoSettings
from rollouts.trajectory import Scored, Trajectory


@dataclass(frozen=True)
class Episode:
    """One response of T tokens with its targets. Tensors are `[T]` float32, on the CPU, of true length.

    old_logprobs, reference_logprobs: nats. advantages: whitened over the batch if the settings say so.
    returns, old_values: in the reward's unit, never whitened.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    old_logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


def make_episodes(
    trajectories: Sequence[Trajectory], scored: Sequence[Scored], ppo: PpoSettings, coefficient: float
) -> list[Episode]:
    """Advantages and returns of a whole batch. `coefficient` weighs the KL that is part of the reward."""
    targets = [_targets(t, s, ppo, coefficient) for t, s in zip(trajectories, scored, strict=True)]
    advantages = torch.cat([advantages for advantages, _ in targets])
    if ppo.whiten_advantages:
        advantages = whiten(advantages)
    rows = torch.split(advantages, [trajectory.length for trajectory in trajectories])
    return [
        Episode(
            prompt_ids=trajectory.request.prompt_ids,
            response_ids=trajectory.response_ids,
            old_logprobs=score.logprobs,
            reference_logprobs=score.reference_logprobs,
            advantages=row,
            returns=returns,
            old_values=score.values[:-1],
        )
        for trajectory, score, row, (_, returns) in zip(trajectories, scored, rows, targets, strict=True)
    ]


def _targets(trajectory: Trajectory, scored: Scored, ppo: PpoSettings, coefficient: float) -> tuple[Tensor, Tensor]:
    cut = not trajectory.ended
    goes_on = cut and ppo.cut == "bootstrap"
    score = 0.0 if goes_on else scored.score - (ppo.cut_penalty if cut else 0.0)
    kl = estimate_kl(scored.logprobs, scored.reference_logprobs, ppo.kl.estimator)
    values = scored.values.clone()
    if not goes_on:
        values[-1] = 0.0
    weight = coefficient if ppo.kl.where == "reward" else 0.0
    return gae(token_rewards(score, kl, weight), values, ppo.gamma, ppo.lam)
