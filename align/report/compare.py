"""Writes the page that compares runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.report.comparison import AXES, axes_data, compared_evaluations, comparison_sentence
from align.report.figures import FigureSection, training_sections, upstream_sections
from align.report.render import render, render_within_limit, short_title
from align.report.run_record import RunRecord, read_run_record
from align.report.settings_rows import differing_settings
from align.report.svg import STYLES
from align.runs.folder import RunFolder
from align.runtime.atomic_files import write_text
from policies.errors import UserError


def write_comparison(runs: Sequence[RunFolder], to: Path) -> None:
    """Write a page that compares runs.

    Args:
        runs: Their folders.
        to: The file.

    Raises:
        UserError: There are fewer than two runs, or too many to tell apart, or a file of one is damaged, or the page
            cannot be written there.
    """
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}: create it first")
    if to.exists() and not to.is_file():
        raise UserError(f"--to {to} is not a file: name a new file, or one that may be replaced")
    write_text(to, compare_page(read_runs(runs)))


def read_runs(runs: Sequence[RunFolder]) -> list[RunRecord]:
    """Read runs that are compared; those of the same name are told apart by their paths.

    Raises:
        UserError: See `write_comparison`.
    """
    folders = {run.path.resolve() for run in runs}
    if len(folders) < 2 or len(folders) < len(runs):
        raise UserError("a comparison needs two or more different runs")
    if len(runs) > STYLES:
        raise UserError(
            f"{len(runs)} runs: a comparison shows at most {STYLES}, which colours and dashes can tell apart"
        )
    records = [read_run_record(run.path, run.read_evaluation()) for run in runs]
    names = Counter(record.name for record in records)
    return [replace(run, name=str(run.path)) if names[run.name] > 1 else run for run in records]


def compare_page(runs: Sequence[RunRecord], **live: Any) -> str:
    """The page that compares runs.

    Args:
        runs: The runs, the first of which the others are compared with.
        live: What a live page shows besides.
    """
    first, *others = runs
    columns = [run.name for run in runs]
    columns += [f"{run.name} − {first.name}" for run in others]
    context = {
        "runs": runs,
        "title": " · ".join(run.name for run in runs),
        "sentence": comparison_sentence(runs),
        "settings_rows": differing_settings(runs),
        "evaluation_rows": compared_evaluations(runs),
        "evaluation_header": columns,
        "axes": AXES,
        "axes_data": axes_data(runs),
        **live,
    }

    def draw(limit: int) -> str:
        training = training_sections(runs, limit)
        upstream = upstream_sections(runs, limit)
        links = _links(training, upstream)
        return render("compare", **context, training=training, upstream=upstream, links=links)

    return render_within_limit(draw)


def _links(training: Sequence[FigureSection], upstream: Sequence[FigureSection]) -> list[tuple[str, str]]:
    links = [("settings", "Settings"), ("evaluation", "Evaluation")]
    return links + [(section.name, short_title(section.name)) for section in (*training, *upstream)]
