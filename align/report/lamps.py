"""The ten lamps of a live page: whether each part of a run is healthy."""

from collections.abc import Iterable
from dataclasses import dataclass

from align.diagnosis.verdict import Severity
from align.report.run_record import RunRecord


@dataclass(frozen=True)
class Lamp:
    """A lamp.

    Attributes:
        name: What it watches over.
        tone: `good`, `warning`, `serious`, or `off` as long as there is nothing to judge by.
        says: The same in words.
    """

    name: str
    tone: str
    says: str


@dataclass(frozen=True)
class VitalSign:
    """What a lamp goes by.

    Attributes:
        name: The name of the lamp.
        stage: The stage that logs the metric.
        metric: The metric without which the lamp is off.
        verdicts: The names of the verdicts that make it burn otherwise than green.
    """

    name: str
    stage: str
    metric: str
    verdicts: tuple[str, ...]


VITAL_SIGNS = (
    VitalSign("SFT", "sft", "sft/loss", ("SFT overfits",)),
    VitalSign("Reward model", "reward", "reward_model/loss", ("reward model guesses", "constant term")),
    VitalSign("Reward", "ppo", "reward/mean", ("reward hacking",)),
    VitalSign("Spread", "ppo", "reward/std", ("no spread",)),
    VitalSign("KL", "ppo", "kl/per_sequence", ("KL too strong", "KL too weak")),
    VitalSign("Entropy", "ppo", "policy/entropy", ("entropy collapse",)),
    VitalSign("Updates", "ppo", "policy/gradient_norm", ("skipped updates", "updates too large")),
    VitalSign("Critic", "ppo", "value/explained_variance", ("critic does not learn",)),
    VitalSign("Length", "ppo", "rollout/length_mean", ("truncated responses", "reward model learned length")),
    VitalSign("Sampler", "ppo", "rollout/mismatch_mean", ("sampler mismatch",)),
)


def lamps(runs: Iterable[RunRecord]) -> list[Lamp]:
    """The lamps of some runs; each shows the most serious verdict of any of them."""
    known = list(runs)
    return [_lamp(sign, known) for sign in VITAL_SIGNS]


def _lamp(sign: VitalSign, runs: list[RunRecord]) -> Lamp:
    found = []
    for run in runs:
        found += [verdict for verdict in run.verdicts if verdict.name in sign.verdicts]
    if found:
        worst = min(found, key=lambda verdict: verdict.severity is not Severity.SERIOUS)
        return Lamp(sign.name, worst.severity.value, worst.name)
    if any(run.history.last(sign.stage, sign.metric) is not None for run in runs):
        return Lamp(sign.name, "good", "good")
    return Lamp(sign.name, "off", "not yet known")
