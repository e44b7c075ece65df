"""The figures of a run: each once, in the order of the steps, and of the products that are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.schema import Experiment
from align.runs.folder import begin_run, find_run, folder_of
from align.runs.metric_catalogue import find_metric
from align.runs.record_files import SAMPLES, read_lines
from align.stages import launch
from policies.errors import UserError
from tests.integration.tiny_run import figures, run_in_process


def test_steps_of_an_ensemble_only_increase_when_its_members_end_early(settings: dict[str, Any]) -> None:
    settings["stages"] = ["reward"]
    settings["reward"] |= {"ensemble": {"members": 2}, "batch_size": 4, "normalise": 0}
    settings["reward"] |= {"learning_rate": 1e-30, "evaluate_every": 1, "patience": 1}  # the loss never improves
    rows = figures(run_in_process(settings))
    steps = [row["step"] for row in rows]
    assert steps == sorted(steps)
    assert "reward_model/heldout_accuracy" in rows[-1]


def test_every_metric_of_a_run_is_in_the_catalogue(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gold.py").write_text("def gold(p, r, c): return [float(x.count('e')) for x in r]\n")
    settings["evaluation"]["gold"] = f"{tmp_path}/gold.py:gold"
    settings["sft"]["evaluate_every"] = settings["reward"]["evaluate_every"] = 1
    short = {"kind": "length", "max_tokens": 6, "window": 4}
    settings["reward"] |= {"ensemble": {"members": 2}, "terms": {"model": {"kind": "model"}, "short": short}}
    settings["reward"]["constraint"] = {"term": "short", "at_most": 0.2, "rate": 0.5}
    settings["ppo"] |= {"estimator": "rloo", "samples_per_prompt": 2, "ptx_coefficient": 0.1}
    names = {name for row in figures(run_in_process(settings)) for name in row} - {"stage", "step"}
    assert {name for name in names if find_metric(name) is None} == set()
    assert {"eval/gold_win_rate", "reward/spread", "reward/multiplier", "reward/term/short", "policy/ptx_loss"} <= names


def test_the_same_prompts_are_answered_at_each_evaluation(settings: dict[str, Any]) -> None:
    settings["tracking"] |= {"probes": 2, "samples": 0}
    run = run_in_process(settings)
    rows = [row for row in read_lines(run / SAMPLES) if "reference" in row]
    steps = settings["ppo"]["steps"]
    assert [row["step"] for row in rows] == [step for step in range(1, steps + 1) for _ in range(2)]
    for number in range(2):
        answered = [(row["prompt"], row["reference"]) for row in rows[number::2]]
        assert answered == answered[:1] * steps
    assert rows[0]["prompt"] != rows[1]["prompt"]


def test_a_run_that_is_killed_while_it_is_replaced_cannot_be_resumed(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = Experiment.model_validate(settings)
    with launch.new_run(experiment) as started:
        started.folder.reward.mkdir()

    def kill(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "write_fingerprint", kill)
    with pytest.raises(KeyboardInterrupt), launch.new_run(experiment, ["sft"]):
        pass
    with pytest.raises(UserError, match="is not a run"):
        find_run(str(started.folder.path))


def test_a_stage_that_starts_again_drops_its_figures_and_the_evaluation(settings: dict[str, Any]) -> None:
    experiment = Experiment.model_validate(settings)
    run = folder_of(experiment)
    begin_run(run, experiment)
    for name in ("metrics.jsonl", "samples.jsonl"):
        write_lines(run.path / name, ["sft", "reward", "ppo"])
    run.evaluation.write_text("{}")
    begin_run(run, experiment, ["reward", "ppo"])
    assert [row["stage"] for row in figures(run.path)] == ["sft"]
    assert not run.evaluation.exists()


def write_lines(path: Path, stages: list[str]) -> None:
    path.write_text("".join(json.dumps({"stage": stage, "step": 1, "x": 1.0}) + "\n" for stage in stages))
