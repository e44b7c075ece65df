"""The progress of a stage: a live table on a terminal, otherwise a plain line every few seconds."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Self

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from align.runtime import consoles
from align.runtime.wording import clock

PACE_STEPS = 3
"""Steps of a process after which its pace is told. The first, which compiles and fills caches, does not count in it."""
PLAIN_LINE_SECONDS = 2.0
"""Seconds between plain lines: every step that takes longer has one."""
ROWS = 8
"""Steps in the live table."""


class ProgressBar:
    """Shows the steps of a stage, its newest figures and the estimated time to its end, on standard error."""

    def __init__(self, stage: str, total: int) -> None:
        """stage: the name to show. total: the number of steps."""
        self.stage = stage
        self.total = total
        self.started = time.monotonic()
        self.printed = self.started
        self.steps = 0
        self.tokens = 0
        self.first_step_ended = self.started
        self.view = LiveView(stage, total) if sys.stderr.isatty() else None

    def advance(self, step: int, tokens: int, **figures: float) -> None:
        """Show that a step, counted from 1, has ended.

        Args:
            step: The step.
            tokens: Tokens that it has trained on, prompts included.
            figures: What else to show of it, the same in each step.
        """
        self.steps += 1
        if self.steps == 1:
            self.first_step_ended = time.monotonic()
        elif self.steps <= PACE_STEPS:
            self.tokens += tokens
        eta = f"ETA {clock(self._remaining_seconds(step))}"
        shown = {name: _short(value) for name, value in figures.items()}
        if self.view:
            self.view.show(step, shown, eta)
        elif step == self.total or time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self.printed = time.monotonic()
            _print("  ".join([f"{self.stage} {step}/{self.total}", *(" ".join(item) for item in shown.items()), eta]))
        if self.steps == PACE_STEPS and step < self.total:
            _print(self._pace(step))

    def _pace(self, step: int) -> str:
        """The pace of the first steps but one, and how long the remaining ones take at it."""
        counted_steps = PACE_STEPS - 1
        seconds = (time.monotonic() - self.first_step_ended) / counted_steps
        pace = f"{seconds:.3g} s and {self.tokens // counted_steps:,} tokens per step"
        return f"{self.stage}: {pace}, {clock(seconds * (self.total - step))} to the end"

    def _remaining_seconds(self, step: int) -> float:
        """The remaining time at the pace of this process, which in a resumed run did not do the first steps."""
        seconds_per_step = (time.monotonic() - self.started) / self.steps
        return seconds_per_step * (self.total - step)

    def __enter__(self) -> Self:
        if self.view:
            self.view.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.view:
            self.view.live.stop()


class LiveView:
    """A progress bar, and a table of the last steps under it, which fit 80 columns."""

    def __init__(self, stage: str, total: int) -> None:
        """stage: the name to show. total: the number of steps."""
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[eta]}")
        )
        self._task = self._bar.add_task(stage, total=total, eta="")
        self._rows: deque[Mapping[str, str]] = deque(maxlen=ROWS)
        self._step_started = time.monotonic()
        self.live = Live(self._bar, console=consoles.progress_console)

    def show(self, step: int, figures: Mapping[str, str], eta: str) -> None:
        """Show the figures of a step, and the time to the end."""
        now = time.monotonic()
        self._rows.append({"step": str(step), **figures, "seconds": f"{now - self._step_started:.1f}"})
        self._step_started = now
        self._bar.update(self._task, completed=step, eta=eta)
        self.live.update(Group(self._bar, self._table()))

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in self._rows[-1]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row.values())
        return table


def _print(line: str) -> None:
    consoles.progress_console.print(line, highlight=False, markup=False, soft_wrap=True)


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
