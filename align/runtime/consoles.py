"""Where the commands print: results on standard output, everything else on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)
progress_console = Console(stderr=True)


@contextmanager
def quiet_consoles(*, results: bool, progress: bool) -> Iterator[None]:
    """Within the block, print no tables of results, or no progress. Errors are printed all the same."""
    consoles = {console: results, progress_console: progress}
    before = {each: each.quiet for each in consoles}
    for each, is_quiet in consoles.items():
        each.quiet = is_quiet
    try:
        yield
    finally:
        for each, was_quiet in before.items():
            each.quiet = was_quiet


def escaped(text: object) -> str:
    """A text in which rich takes brackets for brackets."""
    return escape(str(text))
