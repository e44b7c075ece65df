"""What a check is, and what it finds."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from align.data.quality.corpus import Corpus
from align.data.quality.rows import CheckedRow
from align.runtime.wording import counted

FaultSeverity = Literal["problem", "fact"]
REASONS = 3
"""How many reasons a finding names, the most frequent first."""
FEWEST_ROWS = 20
"""So many rows show what is usual."""


@dataclass(frozen=True)
class Flagged:
    """What a check has found.

    Attributes:
        rows: The indices of the rows concerned, in order.
        found: What was found, in words.
        severity: Whether it should be mended, or is worth knowing.
        count: How many rows or pairs are concerned; None: as many as `rows`.
        of: Out of how many; None: all rows.
    """

    rows: Sequence[int]
    found: str
    severity: FaultSeverity = "problem"
    count: int | None = None
    of: int | None = None


@dataclass(frozen=True)
class DataCheck:
    """One kind of fault.

    Attributes:
        kind: Its name.
        finds: What it finds, for the documentation.
        problem_when: When a finding is a problem, for the documentation.
        advice: What to do.
        find: Looks for it; None: there is nothing to report.
        missing: Why it cannot be looked for; None: it can.
    """

    kind: str
    finds: str
    problem_when: str
    advice: str
    find: Callable[[Corpus], Flagged | None]
    missing: Callable[[Corpus], str | None] = lambda corpus: None


def reasons_by_row(rows: Sequence[CheckedRow], find: Callable[[CheckedRow], str | None]) -> dict[int, str]:
    """What is wrong with each row, by its index, without the rows with which nothing is."""
    reasons: dict[int, str] = {}
    for index, row in enumerate(rows):
        found = find(row)
        if found:
            reasons[index] = found
    return reasons


def flagged_by_reason(reasons: Mapping[int, str], what: str, severity: FaultSeverity = "problem") -> Flagged | None:
    """A finding about rows, each with its reason; None where there are none.

    Args:
        reasons: By the index of the row.
        what: What the rows have or are, after their number: `with an empty field`.
        severity: That of the finding.
    """
    if not reasons:
        return None
    counts = Counter(reasons.values())
    named = [f"{reason} ({count:,})" for reason, count in counts.most_common(REASONS)]
    further = len(counts) - len(named)
    if further:
        named.append(f"and {counted(further, 'other reason')}")
    rows = sorted(reasons)
    return Flagged(rows, f"{counted(len(rows), 'row')} {what}: {', '.join(named)}", severity)
