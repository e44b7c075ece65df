"""What a plan says of a folder that holds a run already."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import align
from align.config.schema import Experiment
from tests.integration.tiny_run import make_settings, write_rows


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings whose run, of SFT alone, is finished."""
    shutil.copytree(tiny_model, tmp_path / "model")
    settings = make_settings(tmp_path / "model", tmp_path) | {"stages": ["sft"]}
    align.run(Experiment.model_validate(settings))
    return settings


def plan(settings: dict[str, Any]) -> dict[str, str]:
    return dict(align.plan(Experiment.model_validate(settings)))


def test_a_finished_run_has_nothing_left_to_do(settings: dict[str, Any]) -> None:
    lines = plan(settings)
    assert lines["stages"] == "nothing is left to do"
    assert "earlier run" not in lines


def test_other_data_of_a_finished_run_would_be_trained_again(settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"User: {number} Assistant:", "completion": " cat."} for number in range(40)]
    settings["data"]["demonstrations"] = write_rows(tmp_path / "others.jsonl", rows)
    lines = plan(settings)
    assert lines["stages"] == "sft"
    assert lines["earlier run"] == (
        f"data.demonstrations: the rows, or their tokens, are not those that {tmp_path}/runs/tiny was started with; "
        "--replace runs all stages again, name=… runs them in another folder"
    )


def test_another_model_of_a_finished_run_would_be_trained_again(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model" / "model.safetensors"
    weights = {name: 1.5 * tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    lines = plan(settings)
    assert lines["stages"] == "sft"
    assert lines["earlier run"].startswith(f"model.path: {tmp_path}/model is not the model that")


def test_other_settings_of_a_finished_run_would_be_trained_again(settings: dict[str, Any]) -> None:
    settings["sft"]["batch_size"] = 5
    lines = plan(settings)
    assert lines["stages"] == "sft"
    assert "was started with sft.batch_size 12, and it is 5 now; --replace" in lines["earlier run"]


@pytest.mark.slow
def test_more_steps_of_ppo_are_left_to_do(settings: dict[str, Any], tmp_path: Path) -> None:
    settings |= {"stages": ["sft", "reward", "ppo"], "name": "whole"}
    run = align.run(Experiment.model_validate(settings)).path
    assert plan(settings)["stages"] == "nothing is left to do"
    settings["ppo"]["steps"] += 1
    assert plan(settings)["stages"] == "ppo"
    facts = json.loads((run / "policy" / "stage.json").read_text())
    (run / "policy" / "stage.json").write_text(json.dumps(facts | {"stopped": "enough"}))
    assert plan(settings)["stages"] == "nothing is left to do"
