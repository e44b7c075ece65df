"""Python's garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collections() -> Iterator[None]:
    """Pause the search for reference cycles, within the block or in the decorated function.

    Imports and tokenized data are a million objects that stay. Going through them again and again takes a quarter of
    the seconds of a plan. After the block, they count as old, so that the next collection does not begin with them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # into the oldest generation, without a look at them
        if was_enabled:
            gc.enable()
