"""A new stage is one new file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config.stage import stage_names

ROOT = Path(__file__).parents[2]
PACKAGES = ("align", "policies", "rewards", "rollouts")
COUNT = '''
"""Counts the training prompts."""

import time
from typing import Any

from align.config.stage import Stage


def run_count(context: Any) -> None:
    started = time.perf_counter()
    with context.new_product(context.run.product("count"), {}, started) as folder:
        (folder / "count.txt").write_text(str(len(context.datasets.prompts)))
    context.tracker.log("count", 1, {"count/prompts": len(context.datasets.prompts)})


STAGE = Stage(
    name="count",
    order=15,
    summary="Count the training prompts.",
    folder="counted",
    scratch=(),
    axis="count/step",
    metric_groups=("count",),
    sources=("prompts",),
    runner="align.config.stages.count:run_count",
)
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the four packages with one more file."""
    folder = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "align" / "config" / "stages" / "count.py").write_text(COUNT)
    return folder


def python(tree: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of the tree."""
    line = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(tree), "COLUMNS": "200"}
    return subprocess.run(line, cwd=tree, env=environment, capture_output=True, text=True, timeout=200)


def test_the_documented_table_has_it(tree: Path) -> None:
    done = python(tree, "-c", "from align.config.stage import stages_table; print(stages_table())")
    assert "| `count` | Count the training prompts. | `counted/` | `count/step` | `count/…` |" in done.stdout, (
        done.stderr
    )
    assert "count" not in stage_names()


@pytest.mark.slow
def test_it_is_planned_run_and_done(tree: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"stages": ["count"], "learner": {"ranks": 1}}
    settings["rollouts"] |= {"workers": 1}
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(yaml.safe_dump(settings))
    run = tmp_path / "runs" / "tiny"

    planned = python(tree, "-m", "align", "plan", experiment)
    assert planned.returncode == 0, planned.stderr
    assert ["stages", "count"] in [line.split() for line in planned.stdout.splitlines()], planned.stdout
    assert not run.exists()

    ran = python(tree, "-m", "align", "run", experiment)
    assert ran.returncode == 0, ran.stderr
    assert (run / "counted" / "count.txt").read_text() == "36"  # a tenth of the 40 prompts is held out
    assert json.loads((run / "metrics.jsonl").read_text()) == {"stage": "count", "step": 1, "count/prompts": 36}
    assert json.loads((run / "evaluation.json").read_text())["seconds"].keys() == {"count"}

    refused = python(tree, "-m", "align", "count", experiment)
    assert refused.returncode == 2
    assert f"{run}: stage count is done" in " ".join(refused.stderr.split())
    again = python(tree, "-m", "align", "count", experiment, "--replace")
    assert again.returncode == 0, again.stderr
    assert (run / "counted" / "count.txt").read_text() == "36"
