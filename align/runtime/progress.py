"""The progress of a stage: a live line on a terminal, otherwise a plain line every few seconds."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from align.runtime.wording import clock

PACE_STEPS = 3
"""Steps of a process after which its pace is told. The first, which compiles and fills caches, does not count in it."""
PLAIN_LINE_SECONDS = 5.0
"""Seconds between plain lines: often enough to see that the run is alive, rare enough for a log file."""


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
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(stage, total=total, text="")

    def advance(self, step: int, tokens: int, **figures: float) -> None:
        """Show that a step, counted from 1, has ended.

        Args:
            step: The step.
            tokens: Tokens that it has trained on, prompts included.
            figures: What else to show of it.
        """
        self.steps += 1
        if self.steps == 1:
            self.first_step_ended = time.monotonic()
        elif self.steps <= PACE_STEPS:
            self.tokens += tokens
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        text += f"  ETA {clock(self._remaining_seconds(step))}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step == self.total or time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self.printed = time.monotonic()
            self._print(f"{self.stage} {step}/{self.total}  {text}")
        if self.steps == PACE_STEPS and step < self.total:
            self._print(self._pace(step))

    def _pace(self, step: int) -> str:
        """The pace of the first steps but one, and how long the remaining ones take at it."""
        counted_steps = PACE_STEPS - 1
        seconds = (time.monotonic() - self.first_step_ended) / counted_steps
        pace = f"{seconds:.3g} s and {self.tokens // counted_steps:,} tokens per step"
        return f"{self.stage}: {pace}, {clock(seconds * (self.total - step))} to the end"

    def _print(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def _remaining_seconds(self, step: int) -> float:
        """The remaining time at the pace of this process, which in a resumed run did not do the first steps."""
        seconds_per_step = (time.monotonic() - self.started) / self.steps
        return seconds_per_step * (self.total - step)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
