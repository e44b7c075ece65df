"""Compares the log-probabilities of sampler and learner, which should hold the same policy."""

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

PARITY_PROMPTS = 4
"""How many prompts `check_parity` samples. Wrong weights change every response, so a few are enough."""
PARITY_LIMIT = 0.1
"""Largest mean difference, in nats per token, for the same policy; bfloat16 alone gives 0.01."""


class SamplerMismatch(Fault):
    """Sampler and learner disagree about the policy's probabilities."""


def sampler_mismatch(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> Tensor:
    """|log π_sampler - log π_learner| of every response token of a batch, in nats, one response after another."""
    pairs = zip(trajectories, scored, strict=True)
    return torch.cat([(t.sampler_logprobs - output.logprobs).abs() for t, output in pairs])


def check_mismatch(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs], limit: float | None) -> None:
    """Check the mean mismatch of a batch.

    Args:
        trajectories: The trajectories, with the sampler's log-probabilities.
        scored: Their role outputs, with the learner's log-probabilities.
        limit: Largest mean mismatch, in nats per token; None: no limit.

    Raises:
        SamplerMismatch: The mean exceeds the limit, or is not a number.
    """
    mean = float(sampler_mismatch(trajectories, scored).mean())
    if limit is not None and not mean <= limit:
        raise SamplerMismatch(
            f"the sampler's log-probabilities differ from the learner's by {mean:.3g} nats per token on average, and "
            f"ppo.max_mismatch is {limit:g}: the policy that is sampled is not the one that is trained"
        )


def check_parity(pool: Pool, role_scorer: RoleScorer, requests: Sequence[Request], sampling: Sampling) -> None:
    """Check before the first update that the pool holds the learner's policy.

    Responses to a few prompts are sampled twice: greedily, where each token must be the learner's likeliest or close
    to it, and as in training, where the log-probabilities must agree.

    Args:
        pool: The pool, which has loaded the policy's weights.
        role_scorer: The learner's forward passes.
        requests: Requests, of which the first are sampled.
        sampling: The sampling of training.

    Raises:
        SamplerMismatch: Sampler and learner disagree.
    """
    for trajectory in pool.generate(requests[:PARITY_PROMPTS], replace(sampling, temperature=0.0)):
        (output,) = role_scorer([trajectory], (GREEDY,))
        worst = int(output.shortfalls.argmax())
        shortfall = float(output.shortfalls[worst])
        if not shortfall <= PARITY_LIMIT:
            raise SamplerMismatch(
                f"before the first update the sampler's greedy response to {trajectory.request.prompt!r} is not the "
                f"learner's: its token {worst + 1} is {shortfall:.3g} nats less likely than the learner's choice: the "
                "engine has different weights, or computes them differently"
            )
    for trajectory in pool.generate(requests[:PARITY_PROMPTS], sampling):
        mismatch = sampler_mismatch([trajectory], role_scorer([trajectory], ("policy",)))
        if not float(mismatch.mean()) <= PARITY_LIMIT:
            worst = int(mismatch.argmax())
            raise SamplerMismatch(
                "before the first update the sampler's log-probabilities of a response to "
                f"{trajectory.request.prompt!r} differ from the learner's by {float(mismatch.mean()):.3g} nats per "
                f"token on average, most at token {worst + 1} ({float(mismatch[worst]):.3g}): the engine has "
                "different weights, or computes them differently"
            )
