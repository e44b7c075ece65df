"""Weights on their way to the workers: in pieces that Ray's store shares between processes without copying."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from policies.trunk import AdapterWeights

LARGEST = 2**26
"""Bytes of one parcel, unless a single tensor is larger."""
ALIGNED = 64


@dataclass(frozen=True)
class WeightBundle:
    """Tensors one behind the other. layout: name, dtype, shape and first byte of each; data: `[bytes]` uint8."""

    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]
    data: np.ndarray


def groups(weights: AdapterWeights) -> Iterator[list[str]]:
    """The names of the tensors that travel together, in their order."""
    names: list[str] = []
    size = 0
    for name, tensor in weights.items():
        if names and size + tensor.nbytes > LARGEST:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def pack(weights: AdapterWeights, names: Sequence[str]) -> WeightBundle:
    """A copy of these tensors."""
    layout, start = [], 0
    for name in names:
        tensor = weights[name]
        layout.append((name, tensor.dtype, tuple(tensor.shape), start))
        start += -(-tensor.nbytes // ALIGNED) * ALIGNED
    data = np.zeros(start, dtype=np.uint8)
    for name, _, _, at in layout:
        tensor = weights[name].detach().cpu().contiguous()
        data[at : at + tensor.nbytes] = tensor.view(-1).view(torch.uint8).numpy()
    return WeightBundle(tuple(layout), data)


def unpack(bundles: Iterable[WeightBundle]) -> AdapterWeights:
    """The tensors, as views: to be read and not to be written to."""
    weights = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        for bundle in bundles:
            data = torch.from_numpy(bundle.data)
            for name, dtype, shape, start in bundle.layout:
                end = start + prod(shape) * dtype.itemsize
                weights[name] = data[start:end].view(dtype).view(shape)
    return weights
