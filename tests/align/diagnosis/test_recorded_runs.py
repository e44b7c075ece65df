"""The rules on recorded runs: seven with one thing wrong and seven healthy ones, of six seeds each.

Thresholds were chosen on seeds 0 to 2; seeds 3 to 5 judge them. `experiments/sick_runs/make.py` makes the runs again.
"""

from collections import Counter

import pytest

from experiments.sick_runs.make import CASES, RECORDED, read_recorded
from tests.align.diagnosis.recorded import serious_by_step, verdicts_of

SEEDS = range(6)
RUNS = {(run["name"], run["seed"]): run for run in read_recorded(RECORDED)}
SICK = [key for key in RUNS if RUNS[key]["cause"]]
HEALTHY = [key for key in RUNS if not RUNS[key]["cause"]]


def test_every_case_is_recorded_for_each_seed() -> None:
    assert set(RUNS) == {(name, seed) for name in CASES for seed in SEEDS}
    assert all(RUNS[name, seed]["cause"] == CASES[name].cause for name, seed in RUNS)
    causes = Counter(case.cause for case in CASES.values())
    assert causes.pop(None) == 7
    assert len(causes) == causes.total() == 7


@pytest.mark.parametrize("key", SICK, ids=lambda key: f"{key[0]}-{key[1]}")
def test_the_cause_is_among_the_first_two_verdicts(key: tuple[str, int]) -> None:
    assert RUNS[key]["cause"] in [verdict.name for verdict in verdicts_of(RUNS[key])[:2]]


@pytest.mark.parametrize("key", HEALTHY, ids=lambda key: f"{key[0]}-{key[1]}")
def test_a_healthy_run_is_not_called_sick_at_any_step(key: tuple[str, int]) -> None:
    assert serious_by_step(RUNS[key]) == {}
