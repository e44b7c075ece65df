"""Where the commands print: results on standard output, everything else on standard error."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters other than tab and line feed."""
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
    """A text in which rich takes brackets for brackets, and which cannot control the terminal, as a file name could."""
    return escape(CONTROL.sub("\ufffd", str(text)))
