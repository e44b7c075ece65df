"""The findings about files of data, for people and for programs."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from align.data.quality.catalogue import CHECKS
from align.data.quality.check import DataCheck, FaultSeverity, Flagged
from align.data.quality.corpus import Corpus
from align.data.quality.lengths import length_statistics, parts_by_row
from align.runtime.atomic_files import new_folder, write_json
from align.runtime.wording import counted

FAULT_COLOURS: dict[FaultSeverity, str] = {"problem": "red", "fact": "cyan"}
"""The severities, worst first, and the colours that they are shown in."""
HISTOGRAM_BINS = 60
"""Bars of a histogram."""


@dataclass(frozen=True)
class DataReport:
    """What the checks have found in a corpus.

    Attributes:
        corpus: The rows.
        found: What each check has found, problems first.
        not_checked: Why other checks were not made, by their kind.
    """

    corpus: Corpus
    found: Sequence[tuple[DataCheck, Flagged]]
    not_checked: Mapping[str, str]

    @property
    def problems(self) -> int:
        """How many kinds of problems there are."""
        return sum(flagged.severity == "problem" for _, flagged in self.found)


def check_corpus(corpus: Corpus) -> DataReport:
    """Make all checks."""
    found: list[tuple[DataCheck, Flagged]] = []
    not_checked: dict[str, str] = {}
    for check in CHECKS:
        reason = check.missing(corpus)
        if reason:
            not_checked[check.kind] = reason
            continue
        flagged = check.find(corpus)
        if flagged:
            found.append((check, flagged))
    found.sort(key=lambda pair: list(FAULT_COLOURS).index(pair[1].severity))  # stable: else in the order of the checks
    return DataReport(corpus, found, not_checked)


def report_record(report: DataReport, locations: int) -> dict[str, Any]:
    """The report as a JSON object; docs/data-check.md describes it. locations: how many each finding lists."""
    corpus = report.corpus
    forms = Counter(row.form.name if row.form else "none" for row in corpus.rows)
    return {
        "kind": corpus.kind,
        "files": list(corpus.files),
        "heldout": list(corpus.heldout_files),
        "rows": len(corpus.rows),
        "forms": dict(forms),
        "unit": corpus.unit,
        "lengths": length_statistics(corpus),
        "problems": report.problems,
        "findings": [_finding_record(corpus, check, flagged, locations) for check, flagged in report.found],
        "not_checked": dict(report.not_checked),
    }


def _finding_record(corpus: Corpus, check: DataCheck, flagged: Flagged, locations: int) -> dict[str, Any]:
    count, of = _count(corpus, flagged)
    return {
        "kind": check.kind,
        "severity": flagged.severity,
        "count": count,
        "share": round(count / max(1, of), 6),
        "found": flagged.found,
        "locations": [corpus.rows[index].where for index in flagged.rows[:locations]],
        "advice": check.advice,
    }


def _count(corpus: Corpus, flagged: Flagged) -> tuple[int, int]:
    """How many rows or pairs are concerned, and of how many."""
    count = len(flagged.rows) if flagged.count is None else flagged.count
    return count, len(corpus.rows) if flagged.of is None else flagged.of


def report_tables(report: DataReport, locations: int) -> RenderableType:
    """The lengths and the findings as tables for the terminal. locations: how many each finding lists."""
    corpus = report.corpus
    title = f"{counted(len(corpus.rows), 'row')} of {corpus.kind}: {counted(report.problems, 'kind')} of problems"
    return Group(Text(title, "bold"), _length_table(corpus), _findings_table(report, locations))


def _length_table(corpus: Corpus) -> Table:
    table = Table(title=f"lengths in {corpus.unit}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    statistics = length_statistics(corpus)
    for name in next(iter(statistics.values()), {}):
        table.add_column(name, justify="right")
    for part, values in statistics.items():
        table.add_row(part, *(f"{value:,}" for value in values.values()))
    return table


def _findings_table(report: DataReport, locations: int) -> Table:
    table = Table(title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for check, flagged in report.found:
        count, of = _count(report.corpus, flagged)
        where = ", ".join(report.corpus.rows[index].where for index in flagged.rows[:locations])
        text = Text(f"{flagged.found}\n")
        text.append(where, "dim")
        if flagged.severity == "problem":
            text.append(f"\n→ {check.advice.replace('`', '')}", "cyan")
        severity = Text(flagged.severity, FAULT_COLOURS[flagged.severity])
        table.add_row(severity, check.kind, f"{count:,}\n{count / max(1, of):.1%}", text)
    return table


def write_data_report(report: DataReport, folder: Path, locations: int) -> None:
    """Write `check.json` and `lengths.png` to a folder, in place of an earlier one."""
    with new_folder(folder) as temporary:
        write_json(temporary / "check.json", report_record(report, locations))
        _draw_lengths(report.corpus, temporary / "lengths.png")


def _draw_lengths(corpus: Corpus, file: Path) -> None:
    """A histogram of the lengths of prompts and responses."""
    from matplotlib.figure import Figure

    parts = {name: lengths for name, lengths in parts_by_row(corpus).items() if name != "row"}
    figure = Figure(figsize=(8, 2.5 * max(1, len(parts))), layout="constrained")
    for number, (name, lengths) in enumerate(parts.items(), start=1):
        axes = figure.add_subplot(len(parts), 1, number)
        axes.hist(list(chain.from_iterable(lengths.values())), bins=HISTOGRAM_BINS, color="#4477aa")
        axes.set_xlabel(f"{corpus.unit} of a {name}")
        axes.set_ylabel(f"{name}s")
    figure.savefig(file, dpi=120)
