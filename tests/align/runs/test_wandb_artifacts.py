"""Products, and what a reward model gets wrong, in the files of an offline W&B run."""

import json
from pathlib import Path

import pytest

from align.config.schema import TrackingSettings
from align.runs import wandb_artifacts
from align.runs.sink import RunProduct
from align.runs.tracking import open_tracker
from tests.align.runs.wandb_files import records_in_wandb

OFFLINE = TrackingSettings(wandb="offline")
ROWS = [
    {"difference": -1.0, "prompt": "p", "better": "b", "worse": "w"},
    {"difference": -0.5, "prompt": "p", "better": "b", "worse": "w", "attribute": "helpful"},
]


def product_of(folder: Path, text: str = "weights") -> RunProduct:
    folder.mkdir(exist_ok=True)
    file = folder / "adapter.bin"
    file.unlink(missing_ok=True)
    file.write_text(text)
    return RunProduct("tiny-sft", "adapter", {"adapter.bin": file}, {"rank": 2})


def draw(folder: Path) -> Path:
    from matplotlib.figure import Figure

    path = folder / "plot.png"
    Figure(figsize=(1, 1)).savefig(path)
    return path


def test_a_product_is_logged_once_however_often_the_run_is_opened(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    product = product_of(tmp_path / "sft")
    for _ in range(2):
        with open_tracker(tmp_path / "run", OFFLINE, "tiny", {}) as tracker:
            tracker.keep(product)
            tracker.keep(product)
    (artifact,) = records_in_wandb(tmp_path / "run", "artifact")
    assert (artifact["name"], artifact["type"]) == ("tiny-sft", "adapter")
    assert json.loads(artifact["metadata"]) == {"rank": 2, "sha256": product.sha256, "started_from": {}}
    assert capfd.readouterr() == ("", "")


def test_the_files_of_a_product_stay_as_they_were_when_the_run_replaces_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_tracker(run, OFFLINE, "tiny", {}) as tracker:
        for text in ("first", "second"):
            tracker.keep(product_of(tmp_path / "sft", text))
    artifacts = records_in_wandb(run, "artifact")
    files = [Path(artifact["manifest"]["contents"][0]["local_path"]) for artifact in artifacts]
    assert [file.read_text() for file in files] == ["first", "second"]
    assert all(file.is_relative_to(run) for file in files)
    assert not [path for path in run.glob("wandb/data/artifacts/staging/*") if path.stat().st_size]


def test_the_files_of_a_large_product_are_only_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_artifacts, "MAX_SENT_BYTES", 3)
    run = tmp_path / "run"
    with open_tracker(run, OFFLINE, "tiny", {}) as tracker:
        tracker.keep(product_of(tmp_path / "sft"))
    (artifact,) = records_in_wandb(run, "artifact")
    (entry,) = artifact["manifest"]["contents"]
    assert entry["ref"] == (tmp_path / "sft" / "adapter.bin").as_uri()
    assert "local_path" not in entry
    assert not (run / "wandb" / "products").exists()


def test_a_reward_models_worst_errors_are_a_table_and_its_reliability_an_image(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        with open_tracker(run, OFFLINE, "tiny", {}) as tracker:
            tracker.log("reward", 3, {"reward_model/loss": 0.5})
            tracker.show_errors("reward", 3, ROWS, draw(tmp_path))
    shown = [
        record["item"] for record in records_in_wandb(run, "history") if "reward_model/worst._type" in record["item"]
    ]
    (item,) = shown
    assert (item["reward_model/step"], item["reward_model/reliability._type"]) == (3, "image-file")
    (table,) = run.glob("wandb/offline-run-*/files/media/table/reward_model/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["difference", "prompt", "better", "worse", "attribute"]
    assert content["data"] == [[-1.0, "p", "b", "w", None], [-0.5, "p", "b", "w", "helpful"]]


def test_a_reward_model_without_texts_is_shown_by_its_plot_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_tracker(run, OFFLINE, "tiny", {}) as tracker:
        tracker.show_errors("reward", 3, [], draw(tmp_path))
    (item,) = [record["item"] for record in records_in_wandb(run, "history")]
    assert "reward_model/reliability._type" in item
    assert not any(name.startswith("reward_model/worst") for name in item)
