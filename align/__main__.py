"""`python -m align` runs the command `align`."""

import sys

from align.runtime.shadowing import hidden_package

if hidden := hidden_package():
    print(f"error: {hidden}", file=sys.stderr)
    sys.exit(2)

from align.cli import main  # it needs the packages that a file may hide

main()
