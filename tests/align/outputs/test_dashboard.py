"""The dashboard: which metrics it shows, what is written, and what W&B is sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.load import dump_experiment
from align.config.schema import Experiment
from align.outputs.dashboard import dashboard_metrics
from align.runs.folder import RunFolder
from align.runs.metric_catalogue import SECTIONS, UPSTREAM, WITHOUT_PANEL, all_metrics
from align.runs.tracking import Tracker
from tests.align.runs.wandb_server import serving

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with some metrics, tracked offline: it may have been sent later."""
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.path.mkdir(parents=True)
    settings = {"name": "tiny", "model": {"path": "base"}, "tracking": {"wandb": "offline"}}
    dump_experiment(Experiment.model_validate(settings), run.config)
    Tracker(run.path).log("ppo", 1, {"reward/mean": 1.0, "reward/gold_mean": 1.0, "reward/term/length": 0.5})
    return run


def dashboard(run: RunFolder, **variables: str) -> subprocess.CompletedProcess[str]:
    """`align dashboard` in a process without other variables of W&B."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(run.path.parent), "COLUMNS": "400"}
    command = [sys.executable, "-m", "align", "dashboard", str(run.path)]
    return subprocess.run(
        command, cwd=run.path.parent, env=environment | variables, check=True, capture_output=True, text=True
    )


def panels_of(run: RunFolder) -> dict[str, list[dict[str, object]]]:
    """The panels of each section of the dashboard that is written in a run's folder."""
    spec = json.loads((run.path / "wandb" / "dashboard.json").read_text())["spec"]
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections if section["panels"]}


def test_a_panel_shows_what_every_run_logs_and_what_else_this_one_has_logged() -> None:
    score, gold, terms = SECTIONS[0].panels[:3]
    assert dashboard_metrics(score, []) == ["reward/mean", "reward/kl_penalized", "eval/score_mean"]
    assert dashboard_metrics(gold, []) == dashboard_metrics(terms, []) == []
    logged = ["reward/gold_mean", "reward/term/b", "reward/term/a"]
    assert dashboard_metrics(gold, logged) == ["reward/gold_mean"]
    assert dashboard_metrics(terms, logged) == ["reward/term/b", "reward/term/a"]


def test_every_metric_of_ppo_is_on_a_panel_or_has_a_reason_not_to_be() -> None:
    shown = {name for section in SECTIONS for panel in section.panels for name in panel.metrics}
    upstream = {name for section in UPSTREAM for panel in section.panels for name in panel.metrics}
    for metric in all_metrics():
        assert metric.name in shown | upstream | WITHOUT_PANEL.keys(), metric.name


def test_a_run_that_is_not_logged_in_gets_a_file_and_the_command_that_saves_it(run: RunFolder) -> None:
    said = dashboard(run, WANDB_MODE="offline").stderr
    assert f"dashboard written to {run.path}/wandb/dashboard.json; WANDB_MODE is offline." in said
    assert f"After `wandb login`, `align dashboard {run.path}` saves it in W&B" in said
    panels = panels_of(run)
    assert list(panels) == [section.title for section in SECTIONS]
    assert all(1 <= len(of_section) <= 6 for of_section in panels.values())
    text = json.dumps(panels)
    for name in ("reward/term/length", "reward/gold_mean", "samples", "kl/per_sequence"):
        assert name in text
    assert "eval/gold_mean" not in text


@pytest.mark.slow
def test_a_dashboard_is_saved_and_then_replaced(run: RunFolder) -> None:
    with serving() as server:
        first = dashboard(run, **server.environment)
        again = dashboard(run, **server.environment)
    assert "/me/align?nw=" in first.stdout
    assert first.stdout == again.stdout
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "align", "align tiny")
    assert view["id"]
    assert "Score against" in view["spec"]


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_leaves_the_file(run: RunFolder) -> None:
    said = dashboard(run, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9").stderr
    assert "W&B cannot save it" in said
    assert panels_of(run)
