"""A saved view of W&B with the panels of the catalogue of metrics."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from align.config.schema import Experiment
from align.runs.folder import RunFolder
from align.runs.metric_catalogue import SECTIONS, Panel, Section, all_metrics
from align.runs.record_files import METRICS, read_lines
from align.runs.sink import SAMPLE_TABLE
from align.runs.wandb_run import stop_wandb, tracking_mode, wandb_environment
from align.runtime.atomic_files import write_json
from policies.errors import UserError, first_line
from policies.files.safe_reading import read_object

PANELS_IN_A_ROW = 3
ROOT_KL = "${kl/per_sequence} ** 0.5"
"""Score grows about linearly with the square root of the KL, until it is over-optimised."""


@dataclass(frozen=True)
class Dashboard:
    """What has become of a dashboard.

    Attributes:
        file: Where it is written.
        url: Where W&B shows it; None: it is not saved there.
        reason: Why not; empty where it is.
    """

    file: Path
    url: str | None = None
    reason: str = ""


def make_dashboard(run: RunFolder, experiment: Experiment) -> Dashboard:
    """Write the dashboard of a run, and save it in W&B where the user is logged in.

    A dashboard that has been saved before is replaced.

    Args:
        run: The run.
        experiment: Its settings.

    Raises:
        UserError: The package `wandb-workspaces` is missing.
    """
    file = run.path / "wandb" / "dashboard.json"
    saved = read_object(file) if file.is_file() else {}
    names = logged_names(run)
    with wandb_environment(run.path):
        workspace = make_workspace(experiment, names)
        dashboard = _save(file, workspace, experiment, saved)
        stop_wandb()
    file.parent.mkdir(exist_ok=True)
    write_json(file, _record(workspace))
    return dashboard


def logged_names(run: RunFolder) -> list[str]:
    """The names of the metrics that a run has logged, in order."""
    names: dict[str, None] = {}
    for row in read_lines(run.path / METRICS):
        names.update(dict.fromkeys(row))
    return list(names)


def dashboard_metrics(panel: Panel, logged: Iterable[str]) -> list[str]:
    """The metrics that a panel of the dashboard shows: those of every run, and of the others those that are logged."""
    logged = list(logged)
    conditional = {metric.name for metric in all_metrics() if metric.condition}
    shown = []
    for pattern in panel.metrics:
        found = [name for name in logged if fnmatchcase(name, pattern)]
        shown += found or ([] if pattern in conditional else [pattern])
    return shown


def make_workspace(experiment: Experiment, logged: Sequence[str]) -> Any:
    """The workspace of W&B.

    Args:
        experiment: The settings of the run.
        logged: The names of the metrics that it has logged.

    Raises:
        UserError: The package is missing.
    """
    try:
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(f"align dashboard: {error}: pip install 'align-rlhf[dashboard]'") from error
    sections = []
    for section in SECTIONS:
        panels = list(_panels(section, logged))
        layout = workspaces.SectionLayoutSettings(columns=PANELS_IN_A_ROW, rows=-(-len(panels) // PANELS_IN_A_ROW))
        sections.append(workspaces.Section(name=section.title, panels=panels, is_open=True, layout_settings=layout))
    tracking = experiment.tracking
    return workspaces.Workspace(
        entity=tracking.entity or "",
        project=tracking.project,
        name=f"align {experiment.name}",
        sections=sections,
    )


def _panels(section: Section, logged: Sequence[str]) -> Iterator[Any]:
    """The panels of a section that show something, and those that only W&B has."""
    from wandb_workspaces.reports import v2 as panels

    for panel in section.panels:
        if metrics := dashboard_metrics(panel, logged):
            yield panels.LinePlot(title=panel.title, x=section.axis, y=metrics, title_y=panel.unit)
    if section.name == "reward":
        yield panels.LinePlot(
            title="Score against √KL",
            x="kl/per_sequence",
            y=["reward/mean"],
            xaxis_expression=ROOT_KL,
            title_x="√KL",
            title_y="score",
        )
    if section.name == "text":
        yield panels.WeavePanelSummaryTable(table_name=SAMPLE_TABLE)


def _save(file: Path, workspace: Any, experiment: Experiment, saved: dict[str, Any]) -> Dashboard:
    """Save a workspace in W&B, in place of the one that has been saved."""
    import wandb

    # A run that is tracked offline can be sent later, so only the login counts.
    mode = tracking_mode(experiment.tracking.model_copy(update={"wandb": "auto"}))
    if mode != "online":
        reason = f"WANDB_MODE is {mode}" if os.environ.get("WANDB_MODE") else "nobody is logged in to W&B"
        return Dashboard(file, reason=reason)
    try:
        workspace.entity = workspace.entity or wandb.Api().default_entity
        if saved.get("entity") == workspace.entity and saved.get("project") == workspace.project:
            workspace._internal_name = saved.get("name", "")
            workspace._internal_id = saved.get("id", "")
        workspace.save()
        return Dashboard(file, url=workspace.url)
    except (wandb.Error, OSError, ValueError) as error:
        return Dashboard(file, reason=f"W&B cannot save it: {first_line(error)}")


def _record(workspace: Any) -> dict[str, Any]:
    """A workspace as JSON values: where it is saved, and what it shows."""
    view = workspace._to_model()
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {"entity": view.entity, "project": view.project, "name": view.name, "id": view.id, "spec": spec}
