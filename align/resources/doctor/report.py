"""The findings for people and for programs."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from align.resources.doctor.finding import Finding, FindingState
from align.runtime.wording import counted

COLOURS: dict[FindingState, str] = {"problem": "red", "warning": "yellow", "ok": "green"}
"""The states, worst first, and the colours that they are shown in."""


def findings_table(findings: Mapping[str, Finding]) -> Table:
    """The findings as a table for the terminal, problems first, each cure on the lines after what is wrong.

    Args:
        findings: By the names of the checks.
    """
    table = Table(title=_title(findings), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for state, colour in COLOURS.items():
        for name, finding in findings.items():
            if finding.state == state:
                table.add_row(Text(state, colour), name, _text(finding))
    return table


def findings_record(findings: Mapping[str, Finding]) -> dict[str, Any]:
    """The findings as a JSON object.

    Args:
        findings: By the names of the checks.

    Returns:
        `healthy`, whether there is no problem, and `checks`, a list of `name`, `state`, `found` and `cure`.
    """
    checks = [{"name": name} | asdict(finding) for name, finding in findings.items()]
    return {"healthy": is_healthy(findings), "checks": checks}


def is_healthy(findings: Mapping[str, Finding]) -> bool:
    """Whether there is no problem; warnings are none."""
    return all(finding.state != "problem" for finding in findings.values())


def _title(findings: Mapping[str, Finding]) -> str:
    words = []
    for state in ("problem", "warning"):
        count = sum(finding.state == state for finding in findings.values())
        if count:
            words.append(counted(count, state))
    return f"{counted(len(findings), 'check')}: {' and '.join(words) or 'nothing to mend'}"


def _text(finding: Finding) -> Text:
    text = Text(finding.found)
    if finding.cure:
        text.append(f"\n→ {finding.cure}", style="cyan")
    return text
