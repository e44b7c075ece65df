"""A process reward model from labels of steps to PPO, in whole runs on the tiny model."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.schema import Experiment
from align.outputs.trained_run import TrainedRun, evaluate_on_file, open_run
from align.roles.build import build_roles
from align.runs.folder import find_run, read_facts
from align.scoring.build import build_scorers
from align.stages.pipeline import load_datasets
from align.stages.reward import load_models
from policies.errors import UserError
from tests.integration.tiny_run import WORDS, make_settings, run_in_process, write_rows

CREDITED = ["The cat\nThe dog\nThe mat", "The cat", ""]
"""Responses of three steps, of one, and of none."""


def labelled_rows() -> list[dict[str, Any]]:
    """Rows in TRL's form, whose steps are right where they name one half of the words."""
    pick = random.Random(0)
    rows = []
    for number in range(48):
        words = pick.choices(WORDS, k=1 + number % 3)
        labels = [word in WORDS[::2] for word in words]
        rows.append(
            {"prompt": f"User: {number} Assistant:", "completions": [f"The {w}" for w in words], "labels": labels}
        )
    return rows


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("process")
    made = make_settings(tiny_model, folder)
    made["data"]["step_labels"] = write_rows(folder / "steps.jsonl", labelled_rows())
    made["reward"] = {
        "batch_size": 12,
        "terms": {
            "process": {"kind": "process", "separator": "\n", "weight": 0.5},
            "short": {"kind": "length", "max_tokens": 6, "window": 3},
        },
    }
    made["ppo"] = {"steps": 1, "batch_size": 8, "minibatches": 2}
    made["evaluation"] = {"prompts": 4}
    return made


@pytest.fixture(scope="module")
def run(settings: dict[str, Any]) -> TrainedRun:
    """A run of all three stages."""
    return open_run(run_in_process(settings))


def scores_of_prefixes(run: TrainedRun, prompt: str, response: str) -> list[float]:
    """The probability of each step, by a forward pass of its own over what is read up to its last token."""
    (model,) = load_models(run.experiment, run.folder.reward)
    exchange = run.encoder.exchange(prompt, response)
    probabilities = []
    for step in range(1, 1 + len(response.split("\n"))):
        beginning = "\n".join(response.split("\n")[:step])
        decoded = [
            run.tokenizer.decode(exchange.response_ids[:end]) for end in range(1, len(exchange.response_ids) + 1)
        ]
        tokens = 1 + next(end for end, text in enumerate(decoded) if text.startswith(beginning)) if beginning else 1
        logit = model.score([exchange.prompt_ids], [exchange.response_ids[:tokens]], tokens=64)
        probabilities.append(float(logit.sigmoid()))
    return probabilities


def test_a_response_scores_the_sum_of_what_its_steps_score_as_beginnings(run: TrainedRun) -> None:
    prompts = ["User: name a cat. Assistant:"] * len(CREDITED)
    expected = [sum(scores_of_prefixes(run, *texts)) for texts in zip(prompts, CREDITED, strict=True)]
    assert run.score_by_model(prompts, CREDITED) == pytest.approx(expected, abs=1e-5)


def test_the_rewards_of_steps_reach_ppo(run: TrainedRun) -> None:
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in metrics if "reward/steps/process" in row]
    assert step["reward/step_count/process"] >= 1
    assert step["reward/mean"] == pytest.approx(
        0.5 * step["reward/steps/process"] + step["reward/term/short"], abs=1e-6
    )
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    trained = [sample for sample in samples if "step_rewards" in sample]
    assert trained
    for sample in trained:
        assert len(sample["step_rewards"]) == sample["step_count/process"]
        total = sum(reward for _, reward in sample["step_rewards"])
        assert total == pytest.approx(0.5 * sample["steps/process"], abs=1e-6)


def test_the_stage_records_what_it_measured(run: TrainedRun) -> None:
    facts = read_facts(run.folder.reward)
    assert facts["step_labels"] == "probabilities"
    assert run.evaluation["reward_model"] == {
        name: facts[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "labelled_steps")
    }
    written = json.loads((run.folder.reward / "diagnostics.json").read_text())
    again, worst = evaluate_on_file(run.experiment, run.folder, None, None)
    del written["baselines"]  # of the training data, which is not read again
    assert json.loads(json.dumps(again)) == written
    assert len(worst) == min(20, facts["labelled_steps"])
    with pytest.raises(UserError, match="--classifier scores whole responses"):
        evaluate_on_file(run.experiment, run.folder, None, "some/model")


def test_another_run_adopts_the_model_for_steps_alone(run: TrainedRun, settings: dict[str, Any]) -> None:
    folder = str(run.folder.reward)
    adopting = settings | {"name": "adopting", "stages": ["reward"]}
    adopting["reward"] = {"model": folder, "terms": {"process": {"kind": "process", "separator": "\n"}}}
    path, experiment = find_run(str(run_in_process(adopting)))
    facts = read_facts(path.reward)
    assert (facts["step_labels"], facts["model"]) == ("probabilities", folder)
    (ours,) = load_models(run.experiment, run.folder.reward)
    (adopted,) = load_models(experiment, path.reward)
    assert torch.equal(ours.combined_head.weight, adopted.combined_head.weight)
    as_outcome = adopting | {"reward": {"model": folder}}
    with pytest.raises(UserError, match=r"reward.terms.model is of kind model, .* trained on labels of steps"):
        load_datasets(Experiment.model_validate(as_outcome))


def test_it_is_not_exported_as_a_classifier(run: TrainedRun, tmp_path: Path) -> None:
    from align.outputs.export import export_run

    with pytest.raises(UserError, match="was trained on labels of steps"):
        export_run(run.experiment, run.folder, tmp_path / "exported", "reward model")


def test_numbers_are_learned_in_their_own_units(settings: dict[str, Any]) -> None:
    rows = [row | {"labels": [100.0 + 10.0 * label for label in row["labels"]]} for row in labelled_rows()]
    file = write_rows(Path(settings["runs"]).parent / "numbers.jsonl", rows)
    numbers = settings | {"name": "numbers", "stages": ["sft", "reward"]}
    numbers["data"] = settings["data"] | {"step_labels": file}
    path, experiment = find_run(str(run_in_process(numbers)))
    facts = json.loads((path.reward / "diagnostics.json").read_text())
    assert read_facts(path.reward)["step_labels"] == "numbers"
    assert facts["rmse"] < 30  # of labels from 100 to 110: a head in other units would be off by 100
    (score,) = TrainedRun(experiment, path).score_by_model(["User: 1 Assistant:"], ["The cat"])
    assert 80 < score < 130


def test_the_critic_starts_from_the_adapter_alone(run: TrainedRun) -> None:
    blueprint = build_scorers(run.experiment, run.folder, run.tokenizer).blueprint
    roles = build_roles(blueprint, run.experiment.ppo.active_critic)
    assert roles.critic is not None
    assert not roles.critic.head.weight.any()  # logits of steps are not returns
    weights = roles.trunk.read_adapter("critic")
    assert all(torch.equal(weights[name], tensor) for name, tensor in blueprint.rewards[0].adapter.items())
