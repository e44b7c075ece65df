"""A row of a source, before it is parsed."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row of a source.

    Attributes:
        where: Its location, such as `file:line`.
        values: Columns by name.
        problem: Why the row could not be read; None if it could.
    """

    where: str
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
