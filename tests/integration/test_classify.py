"""Whole runs of the stage `classify`: trained, evaluated, loaded elsewhere, exported, stopped and resumed."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from align.cli import app
from align.outputs.trained_run import open_run
from align.roles.text_classifier import load_text_classifier
from align.runs.folder import RunFolder
from align.runs.lineage import stage_products
from policies.errors import UserError
from policies.files.adapters import load_adapter
from tests.integration.conftest import Command
from tests.integration.test_model_cards import call
from tests.integration.tiny_run import (
    ENVIRONMENT,
    WORDS,
    figures,
    make_settings,
    run_a_step_at_a_time,
    run_in_process,
    write_rows,
)

LOADED = """
import sys, torch
from align.outputs.trained_run import open_run
run = open_run(sys.argv[1])
texts = ["a red door", "the cat", "two blue dogs"]
torch.save(run._text_classifier.outputs([run.encoder.prompt(text) for text in texts]), sys.argv[2])
"""


def labelled(count: int, task: str) -> list[dict[str, Any]]:
    """Texts whose label follows from their words."""
    pick = random.Random(1)
    rows = []
    for _ in range(count):
        words = [pick.choice(WORDS) for _ in range(4)]
        reds = words.count("red") + words.count("blue")
        label: Any = ("none", "one", "some")[min(reds, 2)]
        rows.append({"text": " ".join(words), "label": label if task == "classification" else 10.0 + reds})
    return rows


def classify_settings(model: Path, folder: Path, task: str = "classification", **classify: Any) -> dict[str, Any]:
    settings = make_settings(model, folder)
    settings["data"]["labels"] = write_rows(folder / "labels.jsonl", labelled(60, task))
    settings["data"]["labels_heldout"] = write_rows(folder / "heldout.jsonl", labelled(24, task)[::-1])
    settings["classify"] = {"batch_size": 12, "checkpoint_every": 1, "learning_rate": 1e-2} | classify
    return settings | {"stages": ["classify"]}


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SFT and a classifier."""
    folder = tmp_path_factory.mktemp("classify")
    return run_in_process(classify_settings(tiny_model, folder, epochs=3) | {"stages": ["sft", "classify"]})


@pytest.fixture(scope="module")
def regression(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a regression model of top layers on the base."""
    folder = tmp_path_factory.mktemp("regression")
    settings = classify_settings(tiny_model, folder, "regression")
    return run_in_process(settings | {"policy": {"method": "top_layers"}})


def test_a_classifier_is_trained_from_the_sft_model_and_evaluated(run: Path) -> None:
    diagnostics = json.loads((run / "classifier" / "diagnostics.json").read_text())
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert diagnostics["task"] == "classification"
    assert diagnostics["rows"] == 24 == sum(map(sum, diagnostics["confusion"]))
    assert list(diagnostics["by_class"]) == ["none", "one", "some"]
    assert evaluation["classifier"] == {
        name: value for name, value in diagnostics.items() if name not in ("confusion", "baseline", "log_loss")
    }
    steps = [line for line in figures(run) if line["stage"] == "classify"]
    assert len([line for line in steps if "classifier/loss" in line]) == 15
    assert steps[-1]["classifier/heldout_accuracy"] == diagnostics["accuracy"]
    assert diagnostics["log_loss"] == pytest.approx(
        json.loads((run / "classifier" / "stage.json").read_text())["heldout_loss"], rel=1e-5
    )
    policy = open_run(run).experiment.policy
    sft = load_adapter(run / "sft", policy)
    trained = load_adapter(run / "classifier", policy)
    assert sft.keys() == trained.keys()
    assert 0 < max(float((sft[name] - trained[name]).abs().max()) for name in sft) < 0.2


def test_the_worst_errors_are_wrong_and_sorted(run: Path) -> None:
    errors = [json.loads(line) for line in (run / "classifier" / "worst.jsonl").read_text().splitlines()]
    heldout = {row["text"]: row["label"] for row in labelled(24, "classification")}
    assert errors
    assert [error["probability"] for error in errors] == sorted(error["probability"] for error in errors)
    for error in errors:
        assert error["label"] == heldout[error["text"]] != error["predicted"]
        assert error["probability"] <= error["of_predicted"]


def test_it_is_the_same_to_the_bit_in_another_process(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADED, str(run), str(tmp_path / "outputs.pt")]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=200)
    here = open_run(run)
    model = load_text_classifier(here.experiment.model, here.experiment.policy, run / "classifier")
    texts = ["a red door", "the cat", "two blue dogs"]
    outputs = model.outputs([here.encoder.prompt(text) for text in texts])
    assert torch.equal(outputs, torch.load(tmp_path / "outputs.pt", weights_only=True))
    assert len(set(outputs.flatten().tolist())) == outputs.numel()


def test_a_text_is_labelled_alone_as_in_the_evaluation(run: Path) -> None:
    rows = labelled(24, "classification")
    trained = open_run(run)
    predictions = trained.classify([row["text"] for row in rows])
    right = sum(prediction.label == row["label"] for prediction, row in zip(predictions, rows, strict=True))
    assert right / 24 == pytest.approx(trained.evaluation["classifier"]["accuracy"])
    for prediction in predictions:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert max(prediction.probabilities, key=prediction.probabilities.__getitem__) == prediction.label
    (alone,) = trained.classify([rows[0]["text"]])
    assert alone.probabilities == pytest.approx(predictions[0].probabilities, abs=1e-6)


def test_numbers_are_predicted_on_the_scale_of_the_labels(regression: Path) -> None:
    rows = labelled(24, "regression")
    trained = open_run(regression)
    predictions = trained.classify([row["text"] for row in rows])
    square = [(float(p.label) - row["label"]) ** 2 for p, row in zip(predictions, rows, strict=True)]
    figure = trained.evaluation["classifier"]
    assert figure["task"] == "regression"
    assert (sum(square) / 24) ** 0.5 == pytest.approx(figure["rmse"], rel=1e-5)
    assert 9 < float(predictions[0].label) < 14
    errors = [json.loads(line) for line in (regression / "classifier" / "worst.jsonl").read_text().splitlines()]
    assert len(errors) == 20
    assert abs(errors[0]["predicted"] - errors[0]["label"]) == pytest.approx(max(square) ** 0.5, rel=1e-5)


def export(run: Path, to: Path) -> str:
    """Export the classifier, and give the code of its card without its example."""
    result = CliRunner().invoke(app, ["export", str(run), "--classifier", "--to", str(to)])
    assert result.exit_code == 0, result.exception
    code = (to / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    return "\n".join(code.splitlines()[:-1])


def test_an_exported_classifier_has_the_labels_and_probabilities_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [row["text"] for row in labelled(8, "classification")]
    expected = open_run(run).classify(texts)
    code = export(run, tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "none", 1: "one", 2: "some"}
    assert model.config.label2id == {"none": 0, "one": 1, "some": 2}
    classify = pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for found, prediction in zip(classify(texts, batch_size=4), expected, strict=True):
        probabilities = {each["label"]: each["score"] for each in found}
        assert probabilities == pytest.approx(prediction.probabilities, abs=1e-5)
    monkeypatch.chdir(tmp_path / "out")
    assert call(code, "label", [(text,) for text in texts]) == [prediction.label for prediction in expected]
    assert "| accuracy |" in (tmp_path / "out" / "README.md").read_text()


def test_an_exported_regression_model_lacks_the_mean_that_its_config_has(
    regression: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [row["text"] for row in labelled(4, "regression")]
    expected = [prediction.label for prediction in open_run(regression).classify(texts)]
    code = export(regression, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    assert call(code, "label", [(text,) for text in texts]) == pytest.approx(expected, abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(".").eval()
    tokenizer = AutoTokenizer.from_pretrained(".")
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits  # [B, 1]
    outputs = logits.squeeze(-1) + model.config.label_mean
    assert outputs.tolist() == pytest.approx(expected, abs=1e-4)
    assert model.config.problem_type == "regression"


@pytest.mark.parametrize(
    ("policy", "trains"), [({"rank": 2}, "head"), ({"method": "feature"}, "adapter"), ({"method": "full"}, "adapter")]
)
def test_a_head_alone_and_complete_models_are_trained(
    policy: dict[str, Any], trains: str, tiny_model: Path, tmp_path: Path
) -> None:
    run = run_in_process(classify_settings(tiny_model, tmp_path, trains=trains) | {"policy": policy})
    assert (run / "classifier" / "head.safetensors").is_file()
    assert len(open_run(run).classify(["a red door"])[0].probabilities) == 3


def test_a_run_that_is_stopped_after_every_step_is_the_same_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    settings = classify_settings(tiny_model, tmp_path, batch_size=30)
    whole = run_in_process(settings | {"name": "whole"})
    parts = run_a_step_at_a_time(settings | {"name": "parts"})
    assert figures(parts) == figures(whole)
    for path in (whole / "classifier").iterdir():
        if path.name != "stage.json":  # it has the seconds
            assert path.read_bytes() == (parts / "classifier" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_two_ranks_train_the_classifier_of_one(tiny_model: Path, tmp_path: Path, align: Command) -> None:
    losses = []
    for ranks in (0, 2):
        settings = classify_settings(tiny_model, tmp_path, ranks=ranks, zero=2) | {"name": f"ranks-{ranks}"}
        file = tmp_path / f"ranks-{ranks}.yaml"
        file.write_text(json.dumps(settings))
        done = align("run", file)
        assert done.returncode == 0, done.stderr
        losses.append(
            [
                row["classifier/loss"]
                for row in figures(tmp_path / "runs" / f"ranks-{ranks}")
                if "classifier/loss" in row
            ]
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_run_that_is_done_gets_a_classifier_and_keeps_what_it_has(tiny_model: Path, tmp_path: Path) -> None:
    settings = classify_settings(tiny_model, tmp_path)
    run = run_in_process(settings | {"stages": ["sft", "reward"]})
    before = figures(run)
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps(settings))
    for options in ([], ["--replace"]):
        result = CliRunner().invoke(app, ["classify", str(file), "--quiet", *options])
        assert result.exit_code == 0, result.exception
        rows = figures(run)
        assert [row for row in rows if row["stage"] != "classify"] == before
        assert len([row for row in rows if "classifier/loss" in row]) == 5
    assert json.loads((run / "evaluation.json").read_text()).keys() == {"classifier", "reward_model", "seconds"}
    names = {product.name: product for product in stage_products(open_run(run).experiment, RunFolder(run))}
    assert [source.name for source in names["tiny-reward"].sources] == ["tiny-sft"]
    assert [source.name for source in names["tiny-classifier"].sources] == ["tiny-sft"]


def test_the_plan_counts_it(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(json.dumps(classify_settings(tiny_model, tmp_path, epochs=2)))
    result = CliRunner().invoke(app, ["plan", str(file), "--json"])
    assert result.exit_code == 0, result.exception
    lines = dict(json.loads(result.stdout)["lines"])
    assert lines["stages"] == "classify"
    assert lines["classify"] == "60 labelled texts, 2 epochs in batches of up to 12: 10 optimizer steps"
    assert lines["labels"].startswith("3 classes: none ")
    assert "classifier, trained" in lines["memory, classify: learner"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--classifier", "--reward"], "--reward and --classifier are two products"),
        (["--classifier", "--merge"], "--merge is for the policy; a classifier is always exported complete"),
        (["--classifier", "--member", "0"], "--member needs --reward"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str, run: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(run), "--to", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UserError)
    assert said in str(result.exception)


def test_a_run_without_a_classifier_says_how_to_get_one(tiny_model: Path, tmp_path: Path) -> None:
    settings = make_settings(tiny_model, tmp_path) | {"stages": ["sft"]}
    with pytest.raises(UserError, match=r"has no classifier/.*`align classify EXPERIMENT`"):
        open_run(run_in_process(settings)).classify(["a"])


def test_a_damaged_head_is_refused(run: Path, tmp_path: Path) -> None:
    trained = open_run(run)
    copy = tmp_path / "classifier"
    copy.mkdir()
    for path in (run / "classifier").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "labels.json").write_text('{"classes": ["a", "b"]}')
    with pytest.raises(UserError, match=r"the head in .* weight is"):
        load_text_classifier(trained.experiment.model, trained.experiment.policy, copy)
