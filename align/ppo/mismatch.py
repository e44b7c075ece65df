"""What the sampler computes against what the learner does: the two should hold the same policy."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.roles.scoring import GREEDY
from align.runtime.failures import Fault
from align.scoring.reward import RoleScorer
from rollouts.engine import Sampling
from rollouts.pool import Pool
from rollouts.trajectory import Request, RoleOutputs, Trajectory

PROMPTS = 4
PARITY = 0.1
"""Mean nats a token that one policy's probabilities may differ by in two places; bfloat16 alone gives a hundredth."""


class SamplerMismatch(Fault):
    """Sampler and learner disagree about the policy's probabilities."""


def check_mismatch(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], limit: float | None) -> None:
    """Raise SamplerMismatch where the mean gap a token passes the limit, in nats."""
    gap = float(sampler_mismatch(trajectories, scored).mean())
    if limit is not None and not gap <= limit:
        raise SamplerMismatch(
            f"the sampler's log-probabilities are {gap:.3g} nats a token off the learner's, and ppo.max_mismatch is "
            f"{limit:g}: what is sampled is not the policy that is trained"
        )


def check_parity(pool: Pool, roles_score: RoleScorer, requests: Sequence[Request], sampling: Sampling) -> None:
    """Raise SamplerMismatch where the pool's weights and the learner's policy, before any update, are not the same.

    A few prompts are answered twice: greedily, where each token must be the likeliest to the learner too, or as good
    as; and as in training, where the log-probabilities must agree.
    """
    for trajectory in pool.generate(requests[:PROMPTS], replace(sampling, temperature=0.0)):
        (output,) = roles_score([trajectory], (GREEDY,))
        widest = int(output.shortfalls.argmax())
        if not float(output.shortfalls[widest]) <= PARITY:
            raise SamplerMismatch(
                f"before the first update the sampler's greedy response to {trajectory.request.prompt!r} is not the "
                f"learner's: its token {widest + 1} is {float(output.shortfalls[widest]):.3g} nats less likely than "
                "the learner's choice: the engine holds other weights, or computes them otherwise"
            )
    for trajectory in pool.generate(requests[:PROMPTS], sampling):
        gaps = sampler_mismatch([trajectory], roles_score([trajectory], ("policy",)))
        if not float(gaps.mean()) <= PARITY:
            widest = int(gaps.argmax())
            raise SamplerMismatch(
                "before the first update the sampler's log-probabilities of a response to "
                f"{trajectory.request.prompt!r} are {float(gaps.mean()):.3g} nats a token off the learner's, most at "
                f"token {widest + 1} ({float(gaps[widest]):.3g}): the engine holds other weights, or computes them "
                "otherwise"
            )


def sampler_mismatch(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> Tensor:
    """|log π_sampler - log π_learner| of every response token of a batch, in nats."""
    rows = zip(trajectories, scored, strict=True)
    return torch.cat([(t.sampler_logprobs - s.logprobs).abs() for t, s in rows])
