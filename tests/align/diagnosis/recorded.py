"""Judges recorded runs by the rules."""

from typing import Any

from align.diagnosis.diagnose import verdicts
from align.diagnosis.run_figures import RunFigures
from align.diagnosis.verdict import Severity, Verdict

RecordedRun = dict[str, Any]


def verdicts_of(run: RecordedRun, steps: float = float("inf")) -> list[Verdict]:
    """The verdicts on a run after so many steps of PPO."""
    lines = [line for line in run["metrics"] if line["stage"] != "ppo" or line["step"] <= steps]
    return verdicts(RunFigures(lines, run["diagnostics"]))


def serious_by_step(run: RecordedRun) -> dict[int, list[str]]:
    """The serious verdicts after each step at which there are any."""
    last = run["metrics"][-1]["step"]
    found = {}
    for step in range(1, last + 1):
        serious = [verdict.name for verdict in verdicts_of(run, step) if verdict.severity is Severity.SERIOUS]
        if serious:
            found[step] = serious
    return found
