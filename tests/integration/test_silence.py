"""Commands print what align has to say, and nothing of the libraries that they use."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.config.load import dump_experiment
from align.config.schema import Experiment
from tests.integration.conftest import Command

PROGRESS = re.compile(r"(sft|reward|ppo) \d+/\d+  ")
"""How the lines of our own progress bar begin."""


def test_nothing_but_our_own_lines_is_printed(settings: dict[str, Any], align: Command, tmp_path: Path) -> None:
    """Standard error has no loading bars, warnings or notices of libraries."""
    file = tmp_path / "experiment.yaml"
    dump_experiment(Experiment.model_validate(settings), file)
    planned = align("plan", file)
    assert (planned.returncode, planned.stderr) == (0, "")
    ended = align("run", file)
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stderr.splitlines() if not PROGRESS.match(line)] == []


def test_a_plan_for_programs_has_every_line(settings: dict[str, Any], align: Command, tmp_path: Path) -> None:
    """Also those of the same name, here one for each source with rows that are skipped."""
    for source in ("demonstrations", "prompts"):
        rows = Path(settings["data"][source]).read_text()
        bad = tmp_path / f"bad-{source}.jsonl"
        bad.write_text(rows + '{"prompt": 5}\n')
        settings["data"][source] = str(bad)
    settings["data"]["on_bad_row"] = "skip"
    file = tmp_path / "experiment.yaml"
    dump_experiment(Experiment.model_validate(settings), file)
    planned = align("plan", file, "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["name"] == settings["name"]
    skipped = [text for name, text in plan["lines"] if name == "skipped rows"]
    assert skipped == ["1 of data.demonstrations", "1 of data.prompts"]


@pytest.mark.slow
def test_a_quiet_run_prints_nothing_and_one_for_programs_a_single_object(
    settings: dict[str, Any], align: Command, tmp_path: Path
) -> None:
    settings["stages"] = ["sft"]
    file = tmp_path / "experiment.yaml"
    dump_experiment(Experiment.model_validate(settings), file)
    quiet = align("run", file, "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    ended = align("run", file, "--replace", "--json", "--quiet")
    assert (ended.returncode, ended.stderr) == (0, "")
    result = json.loads(ended.stdout)
    assert result["verdicts"] == []
    assert ">done<" in Path(result["report"]).read_text()
    assert result["evaluation"]["seconds"].keys() == {"sft"}
    reported = align("report", result["run"], "--json")
    assert json.loads(reported.stdout) == {name: result[name] for name in ("run", "verdicts", "report")}
    mistaken = align("run", file, "--quiet")
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("error: ")
