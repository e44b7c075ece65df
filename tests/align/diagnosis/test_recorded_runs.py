"""The rules on recorded runs: seven with one thing wrong and the healthy ones, of six seeds each.

Thresholds were chosen on seeds 0 to 2; seeds 3 to 5 judge them. `experiments/sick_runs/make.py` makes the runs again.
"""

import gzip
import json
from collections import Counter
from typing import Any

import pytest

from align.diagnosis.diagnose import verdicts
from align.diagnosis.run_figures import RunFigures
from align.diagnosis.verdict import Severity, Verdict
from experiments.sick_runs.make import CASES, RECORDED

CHOSEN_ON = range(3)
JUDGED_ON = range(3, 6)
LINES = gzip.decompress(RECORDED.read_bytes()).decode().splitlines()
RUNS: dict[tuple[str, int], dict[str, Any]] = {(run["name"], run["seed"]): run for run in map(json.loads, LINES)}
SICK = [key for key in RUNS if RUNS[key]["cause"]]
HEALTHY = [key for key in RUNS if not RUNS[key]["cause"]]


def verdicts_of(key: tuple[str, int], steps: float = float("inf")) -> list[Verdict]:
    """The verdicts on a recorded run after so many steps of PPO."""
    run = RUNS[key]
    lines = [line for line in run["metrics"] if line["stage"] != "ppo" or line["step"] <= steps]
    return verdicts(RunFigures(lines, run["diagnostics"]))


def test_every_case_is_recorded_for_each_seed() -> None:
    assert set(RUNS) == {(name, seed) for name in CASES for seed in (*CHOSEN_ON, *JUDGED_ON)}
    assert all(RUNS[name, seed]["cause"] == CASES[name].cause for name, seed in RUNS)
    causes = Counter(case.cause for case in CASES.values())
    assert len(causes) == 8
    assert causes.pop(None) >= 7
    assert set(causes.values()) == {1}


@pytest.mark.parametrize("key", SICK, ids=lambda key: f"{key[0]}-{key[1]}")
def test_the_cause_is_among_the_first_two_verdicts(key: tuple[str, int]) -> None:
    assert RUNS[key]["cause"] in [verdict.name for verdict in verdicts_of(key)[:2]]


@pytest.mark.parametrize("key", HEALTHY, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_healthy_run_is_not_called_sick_at_any_step(key: tuple[str, int]) -> None:
    last = RUNS[key]["metrics"][-1]["step"]
    for step in range(1, last + 1):
        serious = [verdict.name for verdict in verdicts_of(key, step) if verdict.severity is Severity.SERIOUS]
        assert serious == [], f"at step {step}"
