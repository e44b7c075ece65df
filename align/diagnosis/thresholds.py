"""The thresholds of all rules, with their sources."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A number that a rule compares a figure with.

    Attributes:
        value: The number.
        meaning: The figure, and its unit.
        source: Where the number is from.
    """

    value: float
    meaning: str
    source: str


UNMEASURED = "rule of thumb, not measured yet"
RUNS = "recorded runs, seeds 0 to 2: "
"""Those of experiments/sick_runs, of which a cause was planted in every second one."""

NOISE = Threshold(3.0, "change of a curve, in standard deviations of its noise, that is not chance", "three sigma")
SHORTEST = Threshold(4, "values that a curve needs before its course is judged", "a start, an end, and noise between")

JUDGE_FALL = Threshold(
    0.4,
    "fall of the gold score since its peak, of its range in the run, while the score has risen",
    RUNS + "at least 0.72 where the exploit is planted, at most 0.12 in healthy ones",
)
SPREAD_GROWTH = Threshold(1.5, "growth of the ensemble's disagreement while the score has risen", UNMEASURED)
LENGTH_GAP = Threshold(
    0.25,
    "accuracy of the reward model on the fifth of the comparisons in which the better response is longest beside the "
    "other, less that on the fifth in which it is shortest",
    RUNS + "at least 0.38 where annotators like length, at most 0.15 elsewhere",
)
LENGTH_GROWTH = Threshold(
    1.3,
    "growth of the responses in PPO",
    RUNS + "at least 1.38 where annotators like length, at most 1.24 in healthy ones",
)
EQUAL_GROUPS = Threshold(
    0.8, "share of prompts whose responses all score alike", "Yu et al. 2025 (DAPO), section 3.2: they teach nothing"
)
SPREAD = Threshold(1e-6, "standard deviation of scores, in units of the score", "rounding")
CHANCE = Threshold(0.55, "accuracy of the reward model on held-out comparisons", "chance is 0.5")
OVERFITTING = Threshold(1.05, "held-out loss of SFT at the end, by its lowest", UNMEASURED)

ENTROPY_LEFT = Threshold(
    0.35, "lowest entropy, by that at the start", RUNS + "at most 0.23 where it collapses, at least 0.57 elsewhere"
)
PENALTY = Threshold(
    1.0,
    "standard deviation of the scores by β, which is the largest possible gain in standard deviations",
    "the optimum of the regularised objective, π ∝ π_ref·exp(r/β), to first order in r/β",
)
FAR = Threshold(1.0, "KL to the reference, nats per token", RUNS + "at most 0.28 in healthy ones")
CLIPPED = Threshold(0.4, "share of clipped tokens", UNMEASURED)
UPDATE_KL = Threshold(
    0.1, "KL of an update, nats per token", "ten times the target of OpenAI's Spinning Up (0.01, stopped at 0.015)"
)
EXPLAINED = Threshold(
    0.05,
    "largest explained variance of the critic",
    "a constant explains 0; " + RUNS + "below -0.7 where it does not learn, at least 0.13 in healthy ones",
)
UNEXPLAINED_LEFT = Threshold(
    0.75,
    "variance of the returns that the critic does not explain at the end, by that in the middle of the steps",
    RUNS + "at least 0.9 where it does not learn; 0.51 in a run on film reviews whose critic takes nine",
)
CRITIC_STEPS = Threshold(
    8,
    "steps that a critic has before it is judged",
    RUNS + "by then it explains at least 0.1 in healthy ones, or gets better",
)
SKIPPED = Threshold(0.2, "share of steps with skipped updates", UNMEASURED)

LARGE_MISMATCH = Threshold(
    0.01, "share of tokens whose log-probabilities differ by more than rounding explains", "align/ppo/mismatch.py"
)
STALE_MISMATCH = Threshold(
    0.1, "mean difference of log-probabilities with weights that lag behind, nats per token", UNMEASURED
)
ENDED = Threshold(
    0.5,
    "share of responses that end by themselves, at the start or at the end",
    RUNS + "at most 0.27 at the start where the limit is too small, at least 0.93 elsewhere",
)
HARDLY_ENDED = Threshold(0.2, "the same: too few to learn from ends", UNMEASURED)


def thresholds_table() -> str:
    """A Markdown table of all thresholds, for docs/reading-a-run.md."""
    lines = ["| compared figure | threshold | source |", "|---|---|---|"]
    for threshold in globals().values():
        if isinstance(threshold, Threshold):
            lines.append(f"| {threshold.meaning} | {threshold.value:g} | {threshold.source} |")
    return "\n".join(lines)
