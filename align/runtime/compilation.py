"""torch's compiler, which takes most of a second to load."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import Any
from unittest.mock import patch

Compile = Callable[..., Callable[..., Any]]


@contextmanager
def compiled_on_first_call() -> Iterator[None]:
    """Within the block, let functions that modules decorate by `torch.compile` be compiled when they are first called.

    PEFT imports bitsandbytes even where nothing is quantised, and bitsandbytes decorates functions so.
    """
    import torch

    with patch.object(torch, "compile", partial(_later, torch.compile)):
        yield


def _later(compile_: Compile, function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """As `torch.compile`, with or without arguments."""
    if function is None:
        return partial(_later, compile_, **options)
    compiled = cache(partial(compile_, function, **options))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
