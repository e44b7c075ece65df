"""How many tokens fit the positions of a model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

PROBE_TOKENS = 4


class PositionTables(TorchFunctionMode):
    """Sees the tables of learned positions that a forward pass reads.

    Attributes:
        room: The number of tokens that fit the smallest of these tables; None while none was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.room: int | None = None

    def __torch_function__(  # the signature is torch's
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.embedding:
            self._look_at(*args[:2])
        return func(*args, **(kwargs or {}))

    def _look_at(self, indices: Tensor, table: Tensor) -> None:
        """Take the table's room into account if it is read at consecutive rows: some families leave out the first."""
        if indices.shape[-1] != PROBE_TOKENS:
            return
        first = int(indices.flatten()[0])
        consecutive = torch.arange(first, first + PROBE_TOKENS)
        if bool((indices.cpu() == consecutive).all()):
            room = len(table) - first
            self.room = room if self.room is None else min(self.room, room)


@torch.no_grad()
def position_room(model: PreTrainedModel) -> int | None:
    """The largest number of tokens that a sequence classifier can read.

    Args:
        model: The model; it reads a few tokens here.

    Returns:
        The room of the tables of learned positions; for rotary and relative positions the config's limit; None where
        there is no limit.
    """
    config = model.config.get_text_config()
    special = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    ordinary = next(token for token in range(config.vocab_size) if token not in special)
    end = special[-1] if isinstance(special[-1], int) else ordinary
    ids = [ordinary] * (PROBE_TOKENS - 1) + [end]  # encoder-decoders read the score off at EOS
    tables = PositionTables()
    with tables:
        model(torch.tensor([ids], device=model.device))
    if tables.room is not None:
        return tables.room
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or limit <= 0 or getattr(config, "alibi", False):
        return None
    return limit
