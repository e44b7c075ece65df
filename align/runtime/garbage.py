"""Python's garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause the search for reference cycles, within the block or in the decorated function.

    Imports and tokenized data are a million objects that stay. Going through them again and again takes a quarter of
    the seconds of a plan.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
