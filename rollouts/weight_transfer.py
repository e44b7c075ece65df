"""Transfer of weights to workers: packed in bundles that Ray's object store shares between processes without a copy."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from policies.trunk import AdapterWeights

MAX_BUNDLE_BYTES = 2**26
"""A bundle is not larger than this (64 MiB), unless it is a single tensor: unchanged bundles are not sent again, and
small ones leave more of them unchanged."""
ALIGNMENT = 64
"""Bytes to which each tensor is aligned in a bundle: a cache line, enough for a view in any dtype."""


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor is in a bundle; `offset` is its first byte."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class WeightBundle:
    """Tensors packed one after another in `data`, `[bytes]` uint8."""

    slots: tuple[TensorSlot, ...]
    data: NDArray[np.uint8]


def bundle_names(weights: AdapterWeights) -> Iterator[list[str]]:
    """The names of the tensors of each bundle, in order."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        if names and size + tensor.nbytes > MAX_BUNDLE_BYTES:
            yield names
            names = []
            size = 0
        names.append(name)
        size += tensor.nbytes
    yield names


def pack(weights: AdapterWeights, names: Sequence[str]) -> WeightBundle:
    """Copy these tensors into a bundle."""
    slots: list[TensorSlot] = []
    size = 0
    for name in names:
        tensor = weights[name]
        slots.append(TensorSlot(name, tensor.dtype, tuple(tensor.shape), offset=size))
        size += _aligned(tensor.nbytes)
    data = np.zeros(size, dtype=np.uint8)
    for slot in slots:
        tensor = weights[slot.name].detach().cpu().contiguous()
        data[slot.offset : slot.offset + tensor.nbytes] = tensor.view(-1).view(torch.uint8).numpy()
    return WeightBundle(tuple(slots), data)


def unpack(bundles: Iterable[WeightBundle]) -> AdapterWeights:
    """The tensors of all bundles, as views of their data: read-only."""
    weights: AdapterWeights = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        for bundle in bundles:
            data = torch.from_numpy(bundle.data)
            for slot in bundle.slots:
                end = slot.offset + prod(slot.shape) * slot.dtype.itemsize
                weights[slot.name] = data[slot.offset : end].view(slot.dtype).view(slot.shape)
    return weights


def _aligned(size: int) -> int:
    """A size in bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
