"""Experiments that make their base model: when it is made, when it is refused, and what is left of failures."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.config.schema import Experiment
from align.outputs.export import export_run
from align.outputs.trained_run import open_run
from align.runs.fingerprint import model_digest
from align.stages import made_base
from align.stages.launch import new_run, plan_run, resumed_run
from align.stages.made_base import ORIGIN, make_base, texts_of_row
from policies.errors import UserError
from policies.files.base_model import load_base
from policies.schema import ModelSettings
from tests.integration.tiny_run import figures, run_in_process, write_rows
from tests.policies.files.test_made_base import LLAMA, TEXTS


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Continued pre-training of a base made from nothing, on text."""
    return {
        "name": "world",
        "runs": str(tmp_path / "runs"),
        "stages": ["sft"],
        "model": {"path": str(tmp_path / "base"), "architecture": dict(LLAMA), "tokenizer": {"vocab_size": 320}},
        "policy": {"method": "full"},
        "data": {"demonstrations": write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])},
        "sft": {"learning_rate": 1e-2, "epochs": 1, "checkpoint_every": 1},
        "tracking": {"wandb": "disabled"},
        "cluster": {"threads": 1},
    }


def checked(settings: dict[str, Any]) -> Experiment:
    return Experiment.model_validate(settings)


def test_a_plan_reads_the_base_and_writes_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    planned = plan_run(checked(settings)).lines
    assert sorted(tmp_path.rglob("*")) == before
    assert dict(planned)["base"].startswith("made from nothing: llama, ")
    assert dict(planned)["base"].endswith("a tokenizer of 320 tokens")
    make_base(checked(settings))
    assert plan_run(checked(settings)).lines == planned


def test_a_run_makes_its_base_trains_it_and_exports_it(settings: dict[str, Any], tmp_path: Path) -> None:
    with new_run(checked(settings)) as launch:
        assert (tmp_path / "base" / ORIGIN).is_file()
    run = run_in_process(settings | {"sft": {"learning_rate": 1e-2, "epochs": 3, "batch_size": 8}})
    losses = [line["sft/loss"] for line in figures(run) if "sft/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    trained = open_run(run)
    export_run(trained.experiment, launch.folder, tmp_path / "export", "model")
    assert load_base(ModelSettings(path=str(tmp_path / "export"))).config.hidden_size == LLAMA["hidden_size"]


def test_a_run_whose_base_was_lost_makes_the_same_again(settings: dict[str, Any], tmp_path: Path) -> None:
    with new_run(checked(settings)):
        digest = model_digest(settings["model"]["path"])
    (tmp_path / "base").rename(tmp_path / "lost")
    assert "earlier run" not in dict(plan_run(checked(settings)).lines)
    with resumed_run(str(tmp_path / "runs" / "world")):
        assert model_digest(settings["model"]["path"]) == digest


def test_a_base_that_is_there_is_used_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    make_base(checked(settings))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()}
    make_base(checked(settings | {"name": "another"}))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "base").iterdir()} == before


@pytest.mark.parametrize("part", ["model.architecture", "model.tokenizer", "seed", "the texts of data.demonstrations"])
def test_a_base_made_of_something_else_is_refused(part: str, settings: dict[str, Any], tmp_path: Path) -> None:
    make_base(checked(settings))
    if part == "model.architecture":
        settings["model"]["architecture"] |= {"num_hidden_layers": 1}
    elif part == "model.tokenizer":
        settings["model"]["tokenizer"] = {"vocab_size": 310}
    elif part == "seed":
        settings["seed"] = 1
    else:
        write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[1:]])
    for attempt in (make_base, plan_run):
        with pytest.raises(UserError, match=f"base that was made with another value of {part}: name another folder"):
            attempt(checked(settings))


def test_another_model_at_the_path_is_refused_and_left_alone(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    settings["model"]["path"] = str(tiny_model)
    digest = model_digest(str(tiny_model))
    with pytest.raises(UserError, match=r"is there already, and is not a base made by model\.architecture"):
        make_base(checked(settings))
    assert model_digest(str(tiny_model)) == digest


def test_a_failure_leaves_nothing_half_written(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, value: object) -> None:
        assert (path.parent / "model.safetensors").is_file()
        raise OSError("no space left on device")

    monkeypatch.setattr(made_base, "write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        make_base(checked(settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".base.lock", "texts.jsonl"]


def test_a_base_needs_demonstrations_with_texts(settings: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "texts.jsonl", [{"score": 1}])
    with pytest.raises(UserError, match=r"the rows of data\.demonstrations have no texts"):
        make_base(checked(settings))
    settings["data"] = {"labels": "labels.jsonl"}
    with pytest.raises(UserError, match=r"trained on the texts of data\.demonstrations: set it"):
        make_base(checked(settings))


def test_the_tokenizer_is_trained_on_all_datasets_of_a_mixture(settings: dict[str, Any], tmp_path: Path) -> None:
    talk = [{"messages": [{"role": "user", "content": "xylophone"}, {"role": "assistant", "content": "zyzzyva"}]}] * 9
    settings["data"] = {
        "mixture": {"a": settings["data"]["demonstrations"], "b": write_rows(tmp_path / "b.jsonl", talk)}
    }
    make_base(checked(settings))
    vocabulary = json.loads((tmp_path / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {"xylophone", "zyzzyva", "Ġcat"} <= vocabulary.keys()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"path": "base", "tokenizer": {"vocab_size": 320}}, "`tokenizer` has no effect without `architecture`"),
        ({"path": "base", "architecture": {"hidden_size": 8}}, "`model_type` is missing"),
        ({"path": "base", "architecture": {"model_type": "llama"}, "tokenizer": {"vocab_size": 100}}, "300"),
    ],
)
def test_settings_that_make_no_base_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate({"name": "world", "model": model})


def test_the_texts_of_a_row_are_what_the_model_reads() -> None:
    assert list(texts_of_row({"prompt": "a", "completion": "b", "label": "c"})) == ["a", "b"]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": []}]
    assert list(texts_of_row({"messages": talk})) == ["a", "b"]
    assert list(texts_of_row({"prompt": talk[:1], "completion": "b"})) == ["a", "b"]
    assert list(texts_of_row({"text": "a", "url": "b"})) == ["a"]
    assert list(texts_of_row({"text": None})) == []
