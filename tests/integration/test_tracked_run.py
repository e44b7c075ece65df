"""A whole run as W&B's server has it."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.config.load import load_experiment
from align.outputs.dashboard import dashboard_metrics
from align.runs.folder import RunFolder
from align.runs.lineage import stage_products
from align.runs.metric_catalogue import SECTIONS, find_metric
from tests.align.runs.wandb_server import SentRun, Server, serving
from tests.integration.tiny_run import COMMAND, make_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as started:
        yield started


@pytest.fixture(scope="module")
def tracked(tiny_model: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of all stages that was tracked online, and resumed for one more step of PPO."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = make_settings(tiny_model, folder) | {"tracking": {"wandb": "online", "tensorboard": True}}
    (folder / "experiment.yaml").write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= server.environment
    for arguments in (("run", "experiment.yaml"), ("resume", "runs/tiny", "ppo.steps=4")):
        done = subprocess.run([*COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return RunFolder(folder / "runs" / "tiny")


def steps_of(run: SentRun, axis: str, name: str) -> list[int]:
    return [item[axis] for item in run.history if axis in item and name in item]


def test_each_step_of_each_stage_is_sent_once(tracked: RunFolder, server: Server) -> None:
    assert steps_of(server.run, "sft/step", "sft/loss") == [1, 2, 3]
    assert steps_of(server.run, "reward_model/step", "reward_model/loss") == [1, 2, 3]
    assert steps_of(server.run, "ppo/step", "reward/mean") == [1, 2, 3, 4]


def test_the_products_are_artifacts_that_name_what_they_started_from(tracked: RunFolder, server: Server) -> None:
    experiment = load_experiment(tracked.config)
    latest = {artifact["name"]: artifact for artifact in server.run.artifacts if artifact["name"].startswith("tiny-")}
    assert {name: artifact["type"] for name, artifact in latest.items()} == {
        "tiny-sft": "adapter",
        "tiny-reward": "reward-model",
        "tiny-policy": "adapter",
        "tiny-evaluation": "evaluation",
    }
    for product in stage_products(experiment, tracked):
        assert latest[product.name]["manifest"] == sorted(product.files)
        assert latest[product.name]["metadata"]["sha256"] == product.sha256
        assert latest[product.name]["metadata"]["started_from"] == product.metadata["started_from"]
    assert {"tiny-sft", "tiny-reward"} <= set(server.used)


def test_tables_and_the_plot_of_the_reward_model_are_sent(tracked: RunFolder, server: Server) -> None:
    assert steps_of(server.run, "reward_model/step", "reward_model/worst") == [3]
    assert steps_of(server.run, "reward_model/step", "reward_model/reliability") == [3]
    assert steps_of(server.run, "ppo/step", "samples") == [1, 2, 3, 4]
    assert any(name.startswith("media/images/reward_model/reliability") for name in server.run.files)


def test_the_dashboard_shows_what_the_run_has_logged(tracked: RunFolder, server: Server) -> None:
    logged = {name for item in server.run.history for name in item}
    for section in SECTIONS:
        for panel in section.panels:
            for name in dashboard_metrics(panel, sorted(logged)):
                metric = find_metric(name)
                assert metric is not None, name
                assert name in logged or metric.condition, name
