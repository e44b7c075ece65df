"""The sick and the healthy runs of one seed, made again and judged by the rules."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.sick_runs import make
from tests.align.diagnosis.recorded import serious_by_step, verdicts_of

SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_runs_that_are_made_again_are_judged_as_the_recorded_ones(tmp_path: Path) -> None:
    record = tmp_path / "recorded.jsonl.gz"
    command = [sys.executable, make.__file__, "--to", str(tmp_path), "--seeds", str(SEED), "--record", str(record)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    runs = {run["name"]: run for run in make.read_recorded(record)}
    assert runs.keys() == make.CASES.keys()
    wrong: dict[str, object] = {}
    for name, run in runs.items():
        if run["cause"] is None:
            if serious := serious_by_step(run):
                wrong[name] = serious
        elif run["cause"] not in (found := [verdict.name for verdict in verdicts_of(run)[:2]]):
            wrong[name] = found
    assert wrong == {}
