"""The optimizer's state in another layout: saved by so many ranks at one ZeRO stage, taken up by others.

What a rank saves (`LearnerState.optimizer`): at stage 0 a tensor a parameter; at 1 and 2 its slice of each group's
parameters laid end to end; at 3 its slices of each parameter, laid end to end for each group. Slices are padded with
zeros to equal lengths.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

Part = Mapping[str, Tensor]
"""`N.master` and `N.state.NAME`, where N counts parameters at stage 0, else groups."""


def unshard(parts: Sequence[Part], sizes: Sequence[Sequence[int]], zero: int) -> dict[str, Tensor]:
    """From all ranks' parts to whole vectors: `N.master` and `N.state.NAME` of group N, its parameters end to end.

    sizes: numbers in each parameter of each group. Counts of steps, of one number, stay as they are.
    """
    if zero == 0:
        starts = [sum(map(len, sizes[:group])) for group in range(len(sizes))]
        return {
            f"{group}.{kind}": parts[0][f"{start}.{kind}"]
            if _is_count(kind)
            else torch.cat([parts[0][f"{start + i}.{kind}"].flatten() for i in range(len(sizes[group]))])
            for group, start in enumerate(starts)
            for kind in _kinds(parts[0], start)
        }
    whole = {}
    for group, own in enumerate(sizes):
        for kind in _kinds(parts[0], group):
            slices = [part[f"{group}.{kind}"] for part in parts]
            if _is_count(kind):
                whole[f"{group}.{kind}"] = slices[0]
            elif zero < 3:
                whole[f"{group}.{kind}"] = torch.cat(slices)[: sum(own)]
            else:
                each = [ceil(size / len(parts)) for size in own]
                rows = zip(*(vector[: sum(each)].split(each) for vector in slices), strict=True)
                whole[f"{group}.{kind}"] = torch.cat(
                    [torch.cat(row)[:size] for row, size in zip(rows, own, strict=True)]
                )
    return whole


def shard(
    whole: Part, sizes: Sequence[Sequence[int]], zero: int, rank: int, ranks: int, shapes: Sequence[torch.Size]
) -> dict[str, Tensor]:
    """The part of a rank, of so many at this stage. shapes: of the tensors that the rank's optimizer steps."""
    part: dict[str, Tensor] = {}
    for name, vector in whole.items():
        group, kind = int(name.partition(".")[0]), name.partition(".")[2]
        own = sizes[group]
        if zero == 0:
            start = sum(map(len, sizes[:group]))
            pieces = [vector] * len(own) if _is_count(kind) else list(vector.split(list(own)))
            for i, piece in enumerate(pieces):
                part[f"{start + i}.{kind}"] = piece if _is_count(kind) else piece.view(shapes[start + i])
        elif _is_count(kind):
            part[name] = vector
        elif zero < 3:
            part[name] = _slice(vector, rank, shapes[group].numel())
        else:
            slices = [_slice(p, rank, ceil(size / ranks)) for p, size in zip(vector.split(list(own)), own, strict=True)]
            part[name] = _padded(torch.cat(slices), shapes[group].numel())
    return {name: tensor.clone() for name, tensor in part.items()}


def _kinds(part: Part, number: int) -> list[str]:
    return [name.partition(".")[2] for name in part if name.partition(".")[0] == str(number)]


def _is_count(kind: str) -> bool:
    return kind == "state.step"


def _slice(vector: Tensor, rank: int, length: int) -> Tensor:
    return _padded(vector[rank * length : (rank + 1) * length], length)


def _padded(vector: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, length - len(vector)))
