"""How far a stage is, for people: a live line on a terminal, a plain line now and then otherwise."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PAUSE = 5.0
"""Seconds between plain lines."""


class ProgressBar:
    """The steps of one stage, with its newest figures and the time left, on standard error."""

    def __init__(self, stage: str, total: int) -> None:
        self.stage, self.total = stage, total
        self.started = self.printed = time.monotonic()
        self.first: int | None = None
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
        """Step `step`, the first being 1, has ended with these figures."""
        if self.first is None:
            self.first = step
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        text += f"  left {_clock(self._left(step))}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif step == self.total or time.monotonic() - self.printed >= PAUSE:
            self.printed = time.monotonic()
            print(f"{self.stage} {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def _left(self, step: int) -> float:
        """Seconds, at the pace of this process: a resumed run did not do the first steps itself."""
        assert self.first is not None
        return (time.monotonic() - self.started) / (step - self.first + 1) * (self.total - step)

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
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
