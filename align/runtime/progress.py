"""The progress of a stage: a live line on a terminal, otherwise a plain line every few seconds."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

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
        self.first_step: int | None = None
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

    def advance(self, step: int, **figures: float) -> None:
        """Show that a step, counted from 1, has ended with these figures."""
        if self.first_step is None:
            self.first_step = step
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        text += f"  ETA {_clock(self._remaining_seconds(step))}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step == self.total or time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self.printed = time.monotonic()
            print(f"{self.stage} {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def _remaining_seconds(self, step: int) -> float:
        """The remaining time at the pace of this process, which in a resumed run did not do the first steps."""
        assert self.first_step is not None
        seconds_per_step = (time.monotonic() - self.started) / (step - self.first_step + 1)
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


def _clock(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
