"""Gradients of parameters that must have one."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient(tensor: Tensor) -> Tensor:
    """The gradient of a leaf tensor, which must have one."""
    assert tensor.grad is not None
    return tensor.grad


def flat_gradients(tensors: Iterable[Tensor]) -> Tensor:
    """The gradients of leaf tensors, one after another, in one dimension."""
    return torch.cat([gradient(tensor).flatten() for tensor in tensors])
