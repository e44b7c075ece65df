"""Whole runs of preference optimisation, and what is refused before they start."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.dpo_settings import DpoSettings
from align.config.schema import Experiment
from align.outputs.trained_run import open_run
from align.stages.pipeline import load_datasets
from policies.errors import UserError
from tests.integration.tiny_run import make_settings, run_a_step_at_a_time, run_in_process, write_rows


def dpo_settings(model: Path, folder: Path, **dpo: Any) -> dict[str, Any]:
    settings = make_settings(model, folder)
    del settings["ppo"]
    settings["stages"] = ["sft", "reward", "dpo"]
    settings["dpo"] = {"batch_size": 12, "epochs": 3, "learning_rate": 0.01, "checkpoint_every": 1, **dpo}
    return settings


def figures(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "kto"])
def test_a_run_learns_the_preferences_and_is_evaluated_as_after_ppo(
    tiny_model: Path, tmp_path: Path, loss: str
) -> None:
    run = run_in_process(dpo_settings(tiny_model, tmp_path, loss=loss))
    assert figures(run, "dpo/accuracy")[-1] > 0.8
    assert figures(run, "dpo/loss")[-1] < figures(run, "dpo/loss")[0]
    assert figures(run, "dpo/heldout_accuracy")[0] >= 0.75  # of 4 pairs
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["policy"]["step"] == len(figures(run, "dpo/loss")) == 9
    assert evaluation["policy"]["score_mean"] != evaluation["reference"]["score_mean"]
    assert figures(run, "eval/kl_per_sequence") == [evaluation["policy"]["kl_per_sequence"]]


def test_a_stopped_and_resumed_run_has_the_same_bits(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    settings = [dpo_settings(tiny_model, tmp_path / name, loss="kto", epochs=1) for name in ("whole", "stopped")]
    for own in settings:
        own["stages"] = ["dpo"]
    whole = run_in_process(settings[0])
    stopped = run_a_step_at_a_time(settings[1])
    name = "dpo/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (stopped / name).read_bytes()
    assert figures(whole, "dpo/loss") == figures(stopped, "dpo/loss")


def test_the_first_step_starts_at_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    run = run_in_process(dpo_settings(tiny_model, tmp_path, epochs=0.4))
    assert figures(run, "dpo/loss")[0] == pytest.approx(math.log(2))
    assert figures(run, "dpo/margin")[0] == 0


def test_a_trained_run_gives_its_policy(tiny_model: Path, tmp_path: Path) -> None:
    run = open_run(run_in_process(dpo_settings(tiny_model, tmp_path)))
    assert run.folder.policy == run.path / "dpo"
    before = run.evaluation["policy"]
    assert run.evaluate()["policy"] == pytest.approx(before)
    assert len(run.generate(["cat dog"])) == 1


def test_without_a_reward_only_preferences_are_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    settings = dpo_settings(tiny_model, tmp_path)
    settings["stages"] = ["sft", "dpo"]
    del settings["data"]["prompts"]
    run = run_in_process(settings)
    assert "policy" not in json.loads((run / "evaluation.json").read_text())
    assert figures(run, "dpo/heldout_accuracy") == [1.0]


def test_dpo_and_ppo_do_not_train_the_same_policy(tiny_model: Path, tmp_path: Path) -> None:
    settings = dpo_settings(tiny_model, tmp_path)
    settings["stages"] = ["sft", "reward", "dpo", "ppo"]
    with pytest.raises(ValidationError, match="choose one"):
        Experiment.model_validate(settings)


@pytest.mark.parametrize(
    ("row", "loss", "problem"),
    [
        ({"response": " red.", "rating": 4}, "dpo", "this is a rating of one: use kto"),
        ({"response": " red.", "rating": 4}, "kto", "0 \\(bad\\) or 1 \\(good\\)"),
        ({"chosen": " red.", "rejected": " blue.", "tie": True}, "kto", "equally good"),
    ],
)
def test_rows_that_a_loss_cannot_read_are_refused(
    tiny_model: Path, tmp_path: Path, row: dict[str, Any], loss: str, problem: str
) -> None:
    settings = dpo_settings(tiny_model, tmp_path, loss=loss)
    settings["stages"] = ["dpo"]
    settings["data"]["preferences"] = write_rows(tmp_path / "rows.jsonl", [{"prompt": "cat", **row}] * 4)
    with pytest.raises(UserError, match=problem):
        load_datasets(Experiment.model_validate(settings))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"margin": 0.5}, "only with simpo"),
        ({"loss": "simpo", "desirable_weight": 2.0}, "only with kto"),
        ({"loss": "kto", "label_smoothing": 0.1}, "no effect"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        DpoSettings(**settings)
