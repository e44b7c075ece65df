"""Applies all rules to a run."""

from collections.abc import Callable
from pathlib import Path

from align.diagnosis import policy_rules, reward_rules
from align.diagnosis.run_figures import RunFigures, read_figures
from align.diagnosis.verdict import Severity, Verdict

Rule = Callable[[RunFigures], Verdict | None]
"""Gives a verdict where a run's figures show what the rule looks for."""

RULES: tuple[Rule, ...] = (
    policy_rules.mismatched_sampler,
    policy_rules.skipped_updates,
    reward_rules.no_spread,
    policy_rules.strong_penalty,
    policy_rules.truncated_responses,
    reward_rules.learned_length,
    reward_rules.reward_hacking,
    policy_rules.entropy_collapse,
    policy_rules.dead_critic,
    reward_rules.guessing,
    policy_rules.weak_penalty,
    policy_rules.large_updates,
    reward_rules.constant_term,
    policy_rules.overfitted_sft,
)
"""All rules, causes before what they cause."""


def diagnose(run: Path) -> list[Verdict]:
    """What the metrics of a run say about its health.

    Args:
        run: The run's folder, at whatever stage it is.

    Returns:
        The verdicts, serious ones first, and causes before what they cause.

    Raises:
        UserError: A file of the run cannot be read.
    """
    return verdicts(read_figures(run))


def verdicts(run: RunFigures) -> list[Verdict]:
    """As `diagnose`, of what has been read."""
    found = [verdict for rule in RULES if (verdict := rule(run)) is not None]
    return sorted(found, key=lambda verdict: verdict.severity is not Severity.SERIOUS)
