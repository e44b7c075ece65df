"""Where a run lacks a product, the message says what can be done about it in this run."""

from pathlib import Path
from typing import Any

import pytest

from align.config.schema import Experiment
from align.outputs.artifacts import policy_folder, reward_folder
from align.runs.folder import RunFolder
from align.runs.products import missing_product, wanted_stages
from policies.errors import UserError
from tests.integration.tiny_run import make_settings


def experiment_of(folder: Path, **changes: Any) -> Experiment:
    return Experiment.model_validate(make_settings(folder, folder) | changes)


def message(folder: Path, stage: str, stages: list[str], done: tuple[str, ...] = ()) -> str:
    """What is said where a run with these stages, of which some are done, lacks one."""
    run = RunFolder(folder / "run")
    for name in done:
        run.product(name).mkdir(parents=True)
    return str(missing_product(experiment_of(folder, stages=stages), run, stage)).replace(str(run.path), "RUN")


def test_a_stage_of_the_run_is_resumed(tmp_path: Path) -> None:
    stages = ["sft", "reward", "ppo"]
    assert message(tmp_path, "ppo", stages) == "run RUN has no policy/ yet: `align resume RUN` resumes it"


def test_a_run_that_ends_after_sft_can_be_sampled_from_and_continued(tmp_path: Path) -> None:
    assert message(tmp_path, "ppo", ["sft"], ("sft",)) == (
        "run RUN has no policy/, because it ends after the stages sft: `align generate RUN` samples from its SFT "
        "model; `align reward EXPERIMENT` and then `align ppo EXPERIMENT` with its experiment file adds policy/ to it"
    )


def test_a_run_that_ends_after_the_reward_model_can_be_evaluated_and_continued(tmp_path: Path) -> None:
    assert message(tmp_path, "ppo", ["sft", "reward"], ("sft", "reward")) == (
        "run RUN has no policy/, because it ends after the stages sft, reward: `align generate RUN` samples from its "
        "SFT model; `align eval RUN --reward` evaluates its reward model; `align ppo EXPERIMENT` with its experiment "
        "file adds policy/ to it"
    )


def test_a_run_without_a_reward_stage_is_not_to_be_resumed(tmp_path: Path) -> None:
    text = message(tmp_path, "reward", ["sft"], ("sft",))
    assert "resume" not in text
    assert "`align reward EXPERIMENT` with its experiment file adds reward/ to it" in text


def test_a_reward_of_other_terms_has_no_model(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, reward={"terms": {"short": {"kind": "length", "max_tokens": 9}}})
    text = str(missing_product(experiment, RunFolder(tmp_path), "reward"))
    assert text.endswith("has no reward model: its reward is made of other terms (short)")


def test_a_run_of_the_reward_stage_alone_has_nothing_to_sample_from(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.reward.mkdir(parents=True)
    with pytest.raises(UserError, match="has no policy/, because it ends after the stages reward") as refused:
        policy_folder(experiment_of(tmp_path, stages=["reward"]), run)
    assert "resume" not in str(refused.value)
    with pytest.raises(UserError, match="has no sft/ yet: `align resume"):
        policy_folder(experiment_of(tmp_path), RunFolder(tmp_path / "other"))
    with pytest.raises(UserError, match="has no reward/, because it ends after the stages sft"):
        reward_folder(experiment_of(tmp_path, stages=["sft"]), RunFolder(tmp_path / "other"), None)


def test_ready_made_products_are_stages(tmp_path: Path) -> None:
    experiment = experiment_of(tmp_path, stages=["ppo"], sft={"adapter": "a"})
    assert wanted_stages(experiment) == ["sft", "ppo"]
