"""The records of the stages."""

from pathlib import Path

import pytest
from typer.main import get_command

from align.cli import app
from align.config.schema import DataSettings, Experiment
from align.config.stage import Stage, all_stages, find_stage, stage_names, stages_from, stages_table

ROOT = Path(__file__).parents[3]


def test_stages_run_in_this_order_unless_an_experiment_says_otherwise() -> None:
    assert stage_names() == ["sft", "classify", "reward", "dpo", "ppo"]
    assert Experiment.model_validate({"name": "x", "model": {"path": "m"}}).stages == ["sft", "reward", "ppo"]


@pytest.mark.parametrize("stage", all_stages(), ids=stage_names())
def test_what_a_record_names_exists(stage: Stage) -> None:
    assert callable(stage.load_runner())
    assert stage.evaluation is None or callable(stage.load_evaluation())
    assert set(stage.sources) <= DataSettings.model_fields.keys()


@pytest.mark.parametrize("stage", all_stages(), ids=stage_names())
def test_each_stage_is_a_command_with_its_summary(stage: Stage) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert commands[stage.name].help == stage.summary


def test_no_two_stages_share_a_folder_or_a_group_of_metrics() -> None:
    folders: list[str] = []
    groups: list[str] = []
    for stage in all_stages():
        folders += [stage.folder, *stage.scratch]
        groups += stage.metric_groups
    assert len(folders) == len(set(folders))
    assert len(groups) == len(set(groups))


def test_a_stage_is_found_by_its_name_and_comes_before_the_later_ones() -> None:
    assert find_stage("reward").folder == "reward"
    assert [stage.name for stage in stages_from("reward")] == ["reward", "dpo", "ppo"]
    assert [stage.name for stage in stages_from("classify")] == ["classify"]  # no other stage starts from a classifier
    assert [stage.name for stage in stages_from("sft")] == ["sft", "classify", "reward", "dpo", "ppo"]
    with pytest.raises(KeyError):
        find_stage("nothing")


def test_the_document_has_the_table() -> None:
    assert stages_table() in (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
