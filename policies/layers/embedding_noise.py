"""Noise on the embeddings of tokens, a regulariser of fine-tuning."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def noisy_embeddings(embeddings: nn.Module, lengths: Callable[[], Tensor], alpha: float) -> Iterator[None]:
    """Add noise to what an embedding layer gives within the block.

    The noise is uniform in ±α/√(T·H) for a sequence of T tokens (Jain et al. 2023, "NEFTune", algorithm 1).

    Args:
        embeddings: The embedding layer, from ids `[B, T]` to `[B, T, H]`.
        lengths: Makes the tokens of the sequence that each position belongs to, `[B, T]`, or `[B, 1]` where rows are
            sequences; not called without noise.
        alpha: α; 0: no noise.
    """
    if not alpha:
        yield
        return

    sizes = lengths()

    def add_noise(layer: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        bounds = alpha / (sizes.unsqueeze(-1) * embedded.shape[-1]).sqrt()  # [B, T, 1] or [B, 1, 1]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * bounds.to(embedded.dtype)

    handle = embeddings.register_forward_hook(add_noise)
    try:
        yield
    finally:
        handle.remove()


def lengths_by_token(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[1, N]`: for each token of packed sequences, the length of its sequence."""
    sizes = torch.tensor(lengths)
    return sizes.repeat_interleave(sizes).unsqueeze(0).to(device)  # on a GPU, it would wait for the number of tokens
