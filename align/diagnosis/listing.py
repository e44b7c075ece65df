"""Verdicts in the terminal."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from align.diagnosis.verdict import Evidence, Severity, Verdict

SEVERITY_COLOURS = {Severity.SERIOUS: "bold red", Severity.WARNING: "bold yellow"}


NOTHING_WRONG = "no rule finds anything wrong"
NOTHING_LOGGED = "the run has logged nothing yet by which to judge it"


def verdict_list(verdicts: Sequence[Verdict], is_judged: bool = True) -> RenderableType:
    """Each verdict with its evidence and advice; where there is none, a sentence that says so.

    Args:
        verdicts: The verdicts on a run.
        is_judged: Whether the run has logged anything by which it could be judged.
    """
    if not verdicts:
        return Text(f"diagnosis: {NOTHING_WRONG if is_judged else NOTHING_LOGGED}")
    parts: list[RenderableType] = []
    for verdict in verdicts:
        parts.append(Text.assemble((verdict.name, SEVERITY_COLOURS[verdict.severity]), f": {verdict.text}"))
        for evidence in verdict.evidence:
            parts.append(_indented(f"{evidence_text(evidence)}"))
        parts.append(_indented("try: " + "; ".join(verdict.advice)))
    return Group(*parts)


def verdict_records(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """The verdicts as JSON values."""
    return [asdict(verdict) for verdict in verdicts]


def evidence_text(evidence: Evidence) -> str:
    """A figure in words: its metric, value and step, and what it is compared with."""
    text = f"{evidence.metric} {evidence.value:.4g}"
    if evidence.meaning:
        text += f", {evidence.meaning}"
    if evidence.step:
        text += f" (step {evidence.step})"
    return text if evidence.threshold is None else f"{text}; threshold {evidence.threshold:.4g}"


def _indented(text: str) -> RenderableType:
    return Padding(Text(text), (0, 0, 0, 2))
