"""The hidden states of texts, computed once where only a head on them is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.labels import Label, LabelledText
from align.learner.rank import Rank
from align.roles.text_classifier import TextClassifier, collate_texts
from policies.batching import Batch

TEXTS_AT_ONCE = 64
"""Texts whose states the ranks exchange at once."""


@dataclass(frozen=True)
class TextState:
    """What a head reads of a text.

    Attributes:
        state: The hidden state of its last token, `[H]` in the base's dtype, on the CPU.
        label: Its label.
    """

    state: Tensor
    label: Label

    @property
    def length(self) -> int:
        """Its share of a microbatch."""
        return 1


@dataclass(frozen=True)
class _Numbered:
    """A text and its number in a block."""

    number: int
    text: LabelledText

    @property
    def length(self) -> int:
        return self.text.length


def text_states(rank: Rank, model: TextClassifier, texts: Sequence[LabelledText]) -> list[TextState]:
    """Compute the hidden states of texts, without a gradient.

    All ranks must call it with the same texts; each computes a share of them.

    Args:
        rank: This rank.
        model: The classifier, which is part of the rank's module.
        texts: The texts of all ranks.

    Returns:
        One for each text, the same on all ranks.
    """
    dtype = model.trunk.causal.dtype
    states: list[TextState] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        block = [_Numbered(number, text) for number, text in enumerate(texts[start : start + TEXTS_AT_ONCE])]
        objective = partial(_placed, model=model, size=len(block))
        placed = rank.evaluate(block, objective, partial(_collate, device=rank.device))  # [size, H] float64
        for item, state in zip(block, placed.to(dtype), strict=True):
            states.append(TextState(state.clone(), item.text.label))  # a view would keep its whole block
    return states


def _collate(block: Sequence[_Numbered], device: torch.device) -> tuple[Batch, Tensor]:
    """The tensors of a microbatch, and the numbers `[B]` of its texts."""
    numbers = torch.tensor([item.number for item in block], device=device)
    return collate_texts([item.text.ids for item in block]).to(device), numbers


def _placed(module: Any, batch: Batch, numbers: Tensor, model: TextClassifier, size: int) -> tuple[Tensor, Tensor]:
    """States at their places in `[size, H]` of zeros: those of all microbatches and ranks add up, without rounding."""
    states = model.last_states(batch).double()  # [B, H]
    placed = states.new_zeros(size, states.shape[-1]).index_copy(0, numbers, states)
    return placed.sum(), placed
