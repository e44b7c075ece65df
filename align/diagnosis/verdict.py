"""What a rule says about a run."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is."""

    SERIOUS = "serious"
    """The result cannot be used as it is."""
    WARNING = "warning"
    """Worth a look: the run learns less than it could, or is on the way to something serious."""


@dataclass(frozen=True)
class Evidence:
    """A figure that a verdict rests on.

    Attributes:
        metric: The name of the metric.
        step: The step at which it has the value.
        value: The value.
        threshold: What the rule compares it with; None where the value only illustrates.
        meaning: What the value is, if not the metric itself: such as "highest" or "change from step 3".
    """

    metric: str
    step: int
    value: float
    threshold: float | None = None
    meaning: str = ""


@dataclass(frozen=True)
class Verdict:
    """A cause that a run's metrics show.

    Attributes:
        name: Its name, such as `reward hacking`.
        severity: How bad it is.
        stage: The stage whose metrics show it.
        text: What has happened, in a sentence.
        evidence: The figures that show it.
        advice: What to change, each a setting as `key=value` or a sentence.
    """

    name: str
    severity: Severity
    stage: str
    text: str
    evidence: tuple[Evidence, ...]
    advice: tuple[str, ...]
