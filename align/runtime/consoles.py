"""Where the commands print: results on standard output, everything else on standard error."""

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def escaped(text: object) -> str:
    """A text in which rich takes brackets for brackets."""
    return escape(str(text))
