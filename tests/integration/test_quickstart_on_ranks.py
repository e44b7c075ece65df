"""The quickstart, on a tenth of its preferences, with two ranks in every stage has the results of one process.

Ranks add the same numbers in another order. The difference, of 1e-7 at first, grows with the steps, to 1e-3 in the
thousand steps that all preferences take.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from align.runs.record_files import read_lines
from tests.documents import ROOT

QUICKSTART = ROOT / "experiments" / "quickstart"
FILES = {
    "demonstrations": "demonstrations",
    "preferences": "pairs",
    "preferences_heldout": "pairs_heldout",
    "prompts": "prompts",
    "prompts_heldout": "prompts_heldout",
}
LOSSES = ("sft/heldout_loss", "reward_model/heldout_loss")
MEASURED = ("time/", "perf/")
"""Groups of metrics in seconds and bytes, which differ from run to run."""


def metrics_of(folder: Path) -> dict[str, dict[str, float]]:
    """The last metrics of each stage by name."""
    metrics: dict[str, dict[str, float]] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        named = {key: value for key, value in line.items() if "/" in key and not key.startswith(MEASURED)}
        metrics.setdefault(line["stage"], {}).update(named)
    return metrics


def run(runs: Path, ranks: int) -> dict[str, dict[str, float]]:
    """Run all stages on this many ranks, PPO for one step. Returns the metrics of each stage."""
    settings: dict[str, object] = {
        "name": f"on-{ranks}",
        "runs": runs,
        "model.path": runs / "environment" / "base",
        "sft.ranks": ranks,
        "reward.ranks": ranks,
        "learner.ranks": ranks,
        "data.preferences.limit": 1600,
        "ppo.steps": 1,
        "evaluation.prompts": 16,
        "evaluation.best_of": 0,
    }
    for source, name in FILES.items():
        settings[f"data.{source}.path"] = runs / "environment" / f"{name}.jsonl"
    overrides = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "align", "run", str(QUICKSTART / "experiment.yaml"), *overrides]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
    return metrics_of(runs / f"on-{ranks}")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs, with the environment of the quickstart."""
    command = [sys.executable, str(QUICKSTART / "make.py"), "--to", str(tmp_path / "environment"), "--seed", "0"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_have_the_results_of_one_process(runs: Path) -> None:
    alone = run(runs, 0)
    together = run(runs, 2)
    assert together.keys() == alone.keys() == {"sft", "reward", "ppo"}
    for stage, loss in zip(("sft", "reward"), LOSSES, strict=True):
        assert together[stage][loss] == pytest.approx(alone[stage][loss], rel=1e-5)
    assert {"policy/loss", "value/loss", "reward/mean", "policy/gradient_norm"} <= alone["ppo"].keys()
    for name, value in alone["ppo"].items():
        assert abs(together["ppo"][name] - value) <= 1e-4 * (1 + abs(value)), name
