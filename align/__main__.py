"""`python -m align` runs the command `align`."""

from align.cli import main

main()
