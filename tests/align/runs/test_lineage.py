"""What sinks are told of a run's products."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from align.config.schema import Experiment
from align.runs.folder import RunFolder, write_facts
from align.runs.lineage import evaluation_product, stage_products


def experiment_of(**settings: Any) -> Experiment:
    return Experiment.model_validate({"name": "tiny", "model": {"path": "base"}, "policy": {"rank": 2}, **settings})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose stages are done."""
    run = RunFolder(tmp_path)
    for folder in (run.sft, run.reward, run.policy):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(folder.name)
    write_facts(run.sft, {"heldout_loss": 2.5, "seconds": 3.0, "peak_memory": {"controller": 1}})
    accuracy = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "pairs": 4}
    write_facts(run.reward, accuracy | {"seconds": 4.0, "heldout_loss": float("nan")})
    (run.reward / "worst.jsonl").write_text("{}\n")
    write_facts(run.policy, {"seconds": 5.0})
    (run.policy / "evaluation.json").write_text(json.dumps({"policy": {"score_mean": 1.5}}))
    run.evaluation.write_text(json.dumps({"policy": {"score_mean": 1.5}}))
    return run


def test_a_product_says_its_model_its_method_and_its_figures(run: RunFolder) -> None:
    sft, reward, policy = stage_products(experiment_of(), run)
    assert [(product.name, product.kind) for product in (sft, reward, policy)] == [
        ("tiny-sft", "adapter"),
        ("tiny-reward", "reward-model"),
        ("tiny-policy", "adapter"),
    ]
    metadata = sft.metadata
    assert {name: metadata[name] for name in ("base_model", "method", "rank", "seconds", "heldout_loss")} == {
        "base_model": "base",
        "method": "lora",
        "rank": 2,
        "seconds": 3.0,
        "heldout_loss": 2.5,
    }
    assert reward.metadata["accuracy"] == 0.5
    assert reward.metadata["heldout_loss"] is None
    assert policy.metadata["evaluation"] == {"policy": {"score_mean": 1.5}}


def test_a_product_names_what_it_was_made_from(run: RunFolder) -> None:
    sft, reward, policy = stage_products(experiment_of(), run)
    evaluation = evaluation_product(experiment_of(), run)
    assert sft.metadata["started_from"] == {}
    assert reward.metadata["started_from"] == {"tiny-sft": sft.sha256}
    assert policy.metadata["started_from"] == {"tiny-sft": sft.sha256, "tiny-reward": reward.sha256}
    assert evaluation.metadata["started_from"]["tiny-policy"] == policy.sha256


def test_a_ready_made_product_was_not_made_from_others(run: RunFolder) -> None:
    _, reward, _ = stage_products(experiment_of(reward={"model": "other/reward"}), run)
    assert reward.metadata["started_from"] == {}
    assert reward.metadata["ready_made"] == "other/reward"


def test_only_products_that_are_there_are_listed(run: RunFolder) -> None:
    run.policy.rename(run.best)
    assert [product.name for product in stage_products(experiment_of(), run)] == ["tiny-sft", "tiny-reward"]


def test_files_with_texts_are_left_out_where_texts_stay_here(run: RunFolder) -> None:
    for texts, expected in ((True, True), (False, False)):
        _, reward, _ = stage_products(experiment_of(tracking={"texts": texts}), run)
        assert ("worst.jsonl" in reward.files) == expected


def test_the_sha256_is_that_of_the_list_that_sha256sum_prints(run: RunFolder) -> None:
    (run.sft / "a").mkdir()
    (run.sft / "a" / "b.txt").write_text("b")
    sft = stage_products(experiment_of(), run)[0]
    listed = subprocess.run(["sha256sum", *sorted(sft.files)], cwd=run.sft, capture_output=True, check=True).stdout
    assert sft.sha256 == hashlib.sha256(listed).hexdigest()
