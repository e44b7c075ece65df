"""Names a function that child processes load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class FunctionSource:
    """A function that a child process loads.

    Attributes:
        where: `FILE.py:function` or `module:function`.
        key: The setting that names it, for messages.
        arguments: Further arguments of each call, by name.
        memory_gb: Gigabytes that a process may allocate; None: no limit.
        returns: What it returns for each response: a finite score, a list of spans (see `rewards.spans`), or a reply to
            it (see `rewards.replies`).
    """

    where: str
    key: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    memory_gb: float | None = None
    returns: Literal["scores", "spans", "replies"] = "scores"
