"""Models and data by their names on the hub, offline: from a hub cache that the test writes itself."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.integration.tiny_run import COMMAND, ENVIRONMENT

REVISION = "0" * 40


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path) -> Path:
    """An HF_HOME with the model `owner/tiny` and the data set `owner/prompts`, which has a split `train`."""
    home = tmp_path / "hub"
    cache_model(home, "owner", "tiny", tiny_model)
    rows = [{"question": f"User: name {i} colours. Assistant:", "index": i} for i in range(12)]
    cache_data_set(home, "owner", "prompts", rows)
    return home


def cache_model(home: Path, owner: str, name: str, folder: Path) -> None:
    """Lay a model out as huggingface_hub does."""
    repository = home / "hub" / f"models--{owner}--{name}"
    shutil.copytree(folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)


def cache_data_set(home: Path, owner: str, name: str, rows: Sequence[dict[str, Any]], subset: str = "default") -> None:
    """Lay a data set out as `datasets` does once it has prepared it; offline it reads nothing else."""
    folder = home / "datasets" / f"{owner}___{name}" / subset / "0.0.0" / REVISION
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(folder / f"{name}-train.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    features = {field.name: {"dtype": str(field.type), "_type": "Value"} for field in table.schema}
    split = {"name": "train", "num_bytes": 1, "num_examples": len(rows), "dataset_name": name}
    info = {
        "dataset_name": name,
        "config_name": subset,
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "features": features,
        "splits": {"train": split},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def align(hub: Path, command: str, settings: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `align COMMAND` in a process of its own, which reads HF_HOME when it starts."""
    file = folder / "experiment.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    environment = ENVIRONMENT | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
    line = [*COMMAND, command, str(file)]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture
def from_the_hub(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of one step of PPO whose model and prompts are hub names."""
    settings["stages"] = ["ppo"]
    settings["model"] = {"path": "owner/tiny"}
    settings["data"] = {"prompts": {"path": "owner/prompts", "split": "train", "columns": {"prompt": "question"}}}
    settings["reward"] = {"terms": {"short": {"kind": "length", "max_tokens": 6, "window": 4}}}
    settings["ppo"]["steps"] = 1
    return settings


def test_a_run_takes_model_and_prompts_from_the_hub(hub: Path, from_the_hub: dict[str, Any], tmp_path: Path) -> None:
    ended = align(hub, "run", from_the_hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "runs" / "tiny"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(sample["prompt"].startswith("User: name ") for sample in samples)
    adapter = json.loads((run / "policy" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/tiny"


@pytest.mark.slow
def test_the_plan_counts_the_prompts_from_the_hub(hub: Path, from_the_hub: dict[str, Any], tmp_path: Path) -> None:
    ended = align(hub, "plan", from_the_hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "11 prompts" in ended.stdout  # and one held out


@pytest.mark.parametrize(
    ("key", "wrong"),
    [("model", {"path": "owner/missing"}), ("data", {"prompts": "owner/missing"})],
)
def test_a_wrong_hub_name_is_one_message(
    hub: Path, from_the_hub: dict[str, Any], tmp_path: Path, key: str, wrong: dict[str, Any]
) -> None:
    ended = align(hub, "plan", from_the_hub | {key: wrong}, tmp_path)
    assert ended.returncode == 2
    assert "owner/missing" in ended.stderr
    assert "Traceback" not in ended.stderr
    messages = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert len(messages) == 1


def test_a_wrong_split_is_one_message(hub: Path, from_the_hub: dict[str, Any], tmp_path: Path) -> None:
    from_the_hub["data"]["prompts"]["split"] = "validation"
    ended = align(hub, "plan", from_the_hub, tmp_path)
    assert ended.returncode == 2
    assert "owner/prompts" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_subset_is_read_by_its_name(hub: Path, from_the_hub: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"User: count to {i}. Assistant:", "answer": str(i)} for i in range(10)]
    cache_data_set(hub, "owner", "several", rows, subset="main")
    cache_data_set(hub, "owner", "several", rows[:4], subset="other")
    from_the_hub["data"]["prompts"] |= {"path": "owner/several", "subset": "main"}
    ended = align(hub, "plan", from_the_hub, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "9 prompts" in ended.stdout  # and one held out


@pytest.mark.slow
def test_a_wrong_subset_is_one_message(hub: Path, from_the_hub: dict[str, Any], tmp_path: Path) -> None:
    from_the_hub["data"]["prompts"]["subset"] = "nowhere"
    ended = align(hub, "plan", from_the_hub, tmp_path)
    assert ended.returncode == 2
    assert "owner/prompts" in ended.stderr
    assert "Traceback" not in ended.stderr
