"""`align eval --perplexity`: the base model and the product of each stage on texts and held-out demonstrations."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import align
from align.cli import app
from tests.integration.tiny_run import WORDS, figures, make_settings, run_in_process, write_rows


def sft_settings(model: Path, folder: Path) -> dict[str, Any]:
    """A run that trains an SFT model alone, on two datasets, and measures it on texts at its end."""
    settings = make_settings(model, folder) | {"stages": ["sft"]}
    demonstrations = settings["data"].pop("demonstrations")
    texts = [{"text": f"the {word} is by the door. " * 3} for word in WORDS]
    settings["data"]["mixture"] = {
        "chat": demonstrations,
        "prose": write_rows(folder / "prose.jsonl", [{"text": f"a {word} and a {word}"} for word in WORDS]),
    }
    settings["sft"] |= {"learning_rate": 0.02}
    settings["evaluation"]["texts"] = {"doors": write_rows(folder / "doors.jsonl", texts)}
    return settings


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = sft_settings(tiny_model, tmp_path_factory.mktemp("perplexity"))
    return align.run(align.Experiment.model_validate(settings)).path


def measure(run: Path, *options: object) -> Result:
    return CliRunner().invoke(app, ["eval", str(run), *map(str, options)])


def evaluation_of(run: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads((run / "evaluation.json").read_text())["perplexity"]
    return section


def test_the_held_out_perplexity_is_that_of_training(run: Path) -> None:
    metrics = figures(run)[-1]
    heldout = evaluation_of(run)["heldout"]
    assert set(heldout) == {"chat", "prose"}
    for name, measured in heldout.items():
        sft = measured["models"]["sft"]
        assert math.log(sft["perplexity"]) == pytest.approx(metrics[f"sft/heldout_loss/{name}"], rel=1e-5)
    assert heldout["chat"]["models"]["sft"]["perplexity_ratio_high"] < 0.9  # trained on such rows


def test_the_command_measures_the_texts_that_it_names_and_those_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end = evaluation_of(run)
    monkeypatch.chdir(tmp_path)
    page = Path("page.txt")
    page.write_text("a long answer is a long answer. " * 30)
    result = measure(run, "evaluation.window=64", "--perplexity", page, "--json")
    assert result.exit_code == 0, result.output
    section = json.loads(result.stdout)
    assert section == evaluation_of(run)
    assert section["window"] == 64
    assert at_the_end["window"] == 2048
    assert section["texts"]["doors"] == at_the_end["texts"]["doors"]  # shorter than either window
    measured = section["texts"][str(page)]
    assert measured["documents"] == 1
    assert measured["bytes"] == page.stat().st_size
    assert set(measured["models"]) == {"base", "sft"}
    table = measure(run, "--perplexity", page).output
    assert all(name in table for name in ("page.txt", "doors", "held-out chat"))


def test_full_fine_tuning_starts_from_the_same_base(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    settings = sft_settings(tiny_model, tmp_path) | {"policy": {"method": "full"}}
    section = evaluation_of(run_in_process(settings))
    full = section["texts"]["doors"]["models"]
    lora = evaluation_of(run)["texts"]["doors"]["models"]
    assert full["base"] == pytest.approx(lora["base"], rel=1e-5)
    assert full["sft"]["perplexity"] != pytest.approx(full["base"]["perplexity"], rel=0.01)
    assert full["sft"]["perplexity"] != pytest.approx(lora["sft"]["perplexity"], rel=0.01)


def test_a_finished_run_that_is_resumed_measures_further_texts(run: Path, tmp_path: Path) -> None:
    before = evaluation_of(run)["texts"]["doors"]
    (tmp_path / "more.md").write_text("the cat sat on the mat")
    align.resume(run, [f"evaluation.texts.more={tmp_path / 'more.md'}"])
    texts = evaluation_of(run)["texts"]
    assert set(texts) == {"doors", "more"}
    assert texts["doors"] == before


def test_mistakes_are_told(run: Path, tmp_path: Path) -> None:
    missing = measure(run, "--perplexity", tmp_path / "none.txt")
    assert "perplexity: " in str(missing.exception)
    assert "none.txt does not exist" in str(missing.exception)
    both = measure(run, "--perplexity", tmp_path / "none.txt", "--reward")
    assert "different evaluations" in str(both.exception)
    other = measure(run, "ppo.steps=1")
    assert "ppo.steps=1: an evaluation can change settings of the section evaluation alone" in str(other.exception)
