"""Writes the page about a run."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.evaluation.tables import figure_rows
from align.report.figures import FigureSection, training_sections, upstream_sections
from align.report.headline import sentence, tiles
from align.report.render import render, render_within_limit, short_title
from align.report.run_record import RunRecord
from align.report.sample_rows import first_and_last, pairs
from align.report.settings_rows import changed_settings
from align.report.usage import plan_beside_use, stage_shares, step_shares
from align.runtime.atomic_files import new_folder

DIGITS_OF_A_HASH = 16


def write_report(run: RunRecord) -> Path:
    """Write `report/` of a run, replacing an earlier report.

    Args:
        run: What the run's folder holds.

    Returns:
        The path of `index.html`.
    """
    page = report_page(run)
    with new_folder(run.path / "report") as folder:
        # replace: a lone surrogate, which a tokenizer can produce, is no text.
        (folder / "index.html").write_text(page, encoding="utf-8", errors="replace")
    return run.path / "report" / "index.html"


def report_page(run: RunRecord, **live: Any) -> str:
    """The page about a run.

    Args:
        run: The run.
        live: What a live page shows besides.
    """
    samples = first_and_last(run.samples)
    context = {
        "run": run,
        "title": run.name,
        "repeat": shlex.join(["align", "run", f"{run.path}/config.yaml", f"name={run.name}-again"]),
        "sentence": sentence(run),
        "tiles": tiles(run),
        "pairs": pairs(run.samples),
        "samples": samples,
        "has_gold": any(sample.gold is not None for sample in samples),
        "stage_shares": stage_shares(run),
        "step_shares": step_shares(run),
        "plan_rows": plan_beside_use(run),
        "event_rows": [(event["time"], event["event"], event["text"]) for event in run.events],
        "settings_rows": changed_settings(run),
        "digests": _digests(run.fingerprint),
        **_evaluation(run.evaluation),
        **live,
    }

    def draw(limit: int) -> str:
        training = training_sections([run], limit)
        upstream = upstream_sections([run], limit)
        return render(
            "report", **context, training=training, upstream=upstream, links=_links(context, training, upstream)
        )

    return render_within_limit(draw)


def _links(
    context: Mapping[str, Any], training: Sequence[FigureSection], upstream: Sequence[FigureSection]
) -> list[tuple[str, str]]:
    """Anchor and title of each section of the page."""
    links = [("evaluation", "Evaluation")] if context["evaluation_rows"] else []
    links += [(section.name, short_title(section.name)) for section in training]
    if context["samples"] or context["pairs"]:
        links.append(("samples", "Samples"))
    links += [(section.name, short_title(section.name)) for section in upstream]
    run = context["run"]
    if context["stage_shares"] or context["step_shares"] or context["plan_rows"] or run.events:
        links.append(("cost", "Cost"))
    if run.experiment:
        links += [("settings", "Settings"), ("repeat", "Repeat")]
    return links


def _evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation as a table of the models side by side; without rows where PPO has not ended."""
    if "policy" not in evaluation:
        return {"evaluation_rows": []}
    policy = evaluation["policy"]
    columns = {"reference": evaluation["reference"], f"policy of step {policy['step']}": policy}
    if best := evaluation.get("best_of"):
        columns[f"best of {best['n']}"] = best
    rows = [[label, *cells] for label, cells in figure_rows(list(columns.values()))]
    return {
        "evaluation_rows": rows,
        "evaluation_header": ["figure", *columns],
        "evaluation_note": f"Responses to {evaluation['prompts']:,} held-out prompts.",
    }


def _digests(fingerprint: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The beginning of the hash of each model, function and data source."""
    digests = []
    for group in ("models", "functions", "rows"):
        for name, digest in fingerprint.get(group, {}).items():
            digests.append((name, str(digest)[:DIGITS_OF_A_HASH]))
    return digests
