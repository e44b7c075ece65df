"""Compares the log-probabilities of sampler and learner, which should hold the same policy.

Rounding makes them differ: a bfloat16 logit from 16 to 32 has neighbours 0.125 nats away. So differences are measured
in units in the last place of the logits (`RoleOutputs.logit_spacings`). In bfloat16, sampler and learner of a model of
12 layers differ by 1 to 1.5 units per token on average, and by more than 8 at hardly any token; the average grows as
the square root of the number of layers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

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
LARGE = 8
"""Units by which rounding hardly ever changes a token."""
SUSPICIOUS_MEAN = 2.0
SUSPICIOUS_SHARE = 0.01
"""Mean in units, and share of tokens beyond `LARGE` units, above which the user is warned."""
WRONG_MEAN = 5.0
WRONG_SHARE = 0.2
"""The same above which rounding cannot be the cause, however deep the model is."""

log = logging.getLogger(__name__)


class SamplerMismatch(Fault):
    """Sampler and learner disagree about the policy's probabilities."""


@dataclass(frozen=True)
class Mismatch:
    """Differences between sampler and learner, in units in the last place of the logits.

    Attributes:
        mean: Mean over the tokens.
        large_share: Share of tokens that differ by more than `LARGE` units.
    """

    mean: float
    large_share: float

    @classmethod
    def of(cls, differences: Tensor, spacings: Tensor | float) -> "Mismatch":
        """Measure differences `[N]`, in nats, of logits with these spacings, in nats, one for all or `[N]`."""
        units = differences / spacings  # [N]
        return cls(float(units.mean()), int((units > LARGE).sum()) / len(units))

    @property
    def is_suspicious(self) -> bool:
        """Whether rounding alone rarely differs so much."""
        return not (self.mean <= SUSPICIOUS_MEAN and self.large_share <= SUSPICIOUS_SHARE)

    @property
    def is_wrong(self) -> bool:
        """Whether the two hold different weights or compute them differently; so it is with values that are NaN."""
        return not (self.mean <= WRONG_MEAN and self.large_share <= WRONG_SHARE)

    def __str__(self) -> str:
        return (
            f"{self.mean:.3g} units in the last place of the logits on average, and at {self.large_share:.1%} of the "
            f"tokens by more than {LARGE}"
        )


def sampler_mismatch(trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> Tensor:
    """|log π_sampler - log π_learner| of every token that was sampled, in nats, one response after another."""
    pairs = zip(trajectories, scored, strict=True)
    return torch.cat([t.of_policy((t.sampler_logprobs - output.logprobs).abs()) for t, output in pairs])


@dataclass
class MismatchCheck:
    """Checks the mismatch of every batch.

    Attributes:
        logit_spacing: Unit in the last place of the policy's logits, in nats, divided by the sampling temperature.
        limit: `ppo.max_mismatch`, largest mean mismatch in nats per token; None: what rounding cannot explain.
        same_weights: Whether sampler and learner have the same weights; where they do not, nothing is checked without
            a limit.
        warned: Whether the user has been warned already.
    """

    logit_spacing: float
    limit: float | None = None
    same_weights: bool = True
    warned: bool = field(default=False, init=False)

    def __call__(self, trajectories: Sequence[Trajectory], scored: Sequence[RoleOutputs]) -> None:
        """Check a batch, with the sampler's log-probabilities and, in the role outputs, the learner's.

        Raises:
            SamplerMismatch: The mismatch exceeds the limit, or is not a number.
        """
        differences = sampler_mismatch(trajectories, scored)
        mean = float(differences.mean())
        mismatch = Mismatch.of(differences, self.logit_spacing)
        text = f"the sampler's log-probabilities differ from the learner's by {mean:.3g} nats per token on average"
        if self.limit is not None:
            if not mean <= self.limit:
                raise SamplerMismatch(
                    f"{text}, and ppo.max_mismatch is {self.limit:g}: the policy that is sampled is not the one that "
                    "is trained"
                )
        elif self.same_weights and mismatch.is_wrong:
            raise SamplerMismatch(
                f"{text}, {mismatch}: the policy that is sampled is not the one that is trained. ppo.max_mismatch sets "
                "another limit"
            )
        if self.same_weights and mismatch.is_suspicious and not self.warned:
            self.warned = True
            log.warning(
                "%s, %s: more than rounding usually explains; rollout/mismatch_mean has every step", text, mismatch
            )


def check_parity(pool: Pool, role_scorer: RoleScorer, requests: Sequence[Request], sampling: Sampling) -> float:
    """Check before the first update that the pool holds the learner's policy.

    Responses to a few prompts are sampled twice: greedily, where the learner must find nearly every token the likeliest
    or close to it, and as in training, where the log-probabilities must agree.

    Args:
        pool: The pool, which has loaded the policy's weights.
        role_scorer: The learner's forward passes.
        requests: Requests, of which the first are sampled.
        sampling: The sampling of training.

    Returns:
        The mean unit in the last place of the policy's logits, in nats, divided by the sampling temperature.

    Raises:
        SamplerMismatch: Sampler and learner disagree by more than rounding can explain.
    """
    greedy = pool.generate(requests[:PARITY_PROMPTS], replace(sampling, temperature=0.0))
    scored = role_scorer(greedy, (GREEDY,))
    shortfalls = torch.cat([output.shortfalls for output in scored])  # [N]
    _judge(greedy, shortfalls, torch.cat([output.logit_spacings for output in scored]), "choice of the likeliest token")
    sampled = pool.generate(requests[:PARITY_PROMPTS], sampling)
    scored = role_scorer(sampled, ("policy", GREEDY))
    spacings = torch.cat([output.logit_spacings for output in scored]) / sampling.temperature  # [N]
    _judge(sampled, sampler_mismatch(sampled, scored), spacings, "log-probabilities")
    return float(spacings.mean())


def _judge(trajectories: Sequence[Trajectory], differences: Tensor, spacings: Tensor, subject: str) -> None:
    """Warn or raise SamplerMismatch where differences `[N]` of all tokens exceed what rounding explains."""
    mismatch = Mismatch.of(differences, spacings)
    if not mismatch.is_suspicious:
        return
    worst = int((differences / spacings).argmax())
    nats = float(differences[worst])
    for trajectory in trajectories:
        if worst < trajectory.length:
            break
        worst -= trajectory.length
    text = (
        f"before the first update sampler and learner differ in the {subject} by {mismatch}, most at token "
        f"{worst + 1} of the response to {trajectory.request.prompt!r} ({nats:.3g} nats)"
    )
    if mismatch.is_wrong:
        raise SamplerMismatch(f"{text}: the engine has different weights, or computes them differently")
    log.warning("%s: more than rounding usually explains", text)
