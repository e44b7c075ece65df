"""What the sampler computes against what the learner does: the two should hold the same policy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rollouts.trajectory import Scored, Trajectory


class SamplerGap(RuntimeError):
    """Sampler and learner disagree about the policy's probabilities."""


def check_gap(trajectories: Sequence[Trajectory], scored: Sequence[Scored], limit: float | None) -> None:
    """Raise SamplerGap where the mean gap a token passes the limit, in nats."""
    gap = float(sampler_gaps(trajectories, scored).mean())
    if limit is not None and not gap <= limit:
        raise SamplerGap(
            f"the sampler's log-probabilities are {gap:.3g} nats a token off the learner's, and ppo.max_gap is "
            f"{limit:g}: what is sampled is not the policy that is trained"
        )


def sampler_gaps(trajectories: Sequence[Trajectory], scored: Sequence[Scored]) -> Tensor:
    """|log π_sampler - log π_learner| of every response token of a batch, in nats."""
    rows = zip(trajectories, scored, strict=True)
    return torch.cat([(t.sampler_logprobs - s.logprobs).abs() for t, s in rows])
