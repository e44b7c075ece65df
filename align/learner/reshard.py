"""The optimizer's state in another layout: saved by some ranks at one ZeRO stage, restored by others at another.

Example: one group with the parameters a (5 elements) and b (3 elements), two ranks; `.` is padding:

    stage 0   every rank    [a a a a a]   [b b b]         one tensor per parameter, in the parameter's shape
    full                    [a a a a a b b b]             one vector per group, parameters end to end
    stage 1/2 rank 0        [a a a a]                     slices of the full vector
              rank 1        [a b b b]
    stage 3   rank 0        [a a a b b]                   slices of each parameter, end to end
              rank 1        [a a . b .]

`unshard` goes from any layout to full vectors, `shard` from full vectors to the part of one rank. Both keep every bit.
The names in a part are `N.master` and `N.state.NAME`: N counts parameters at stage 0, and groups otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from policies.errors import UserError

Part = Mapping[str, Tensor]
"""The optimizer's state of one rank: `N.master` and `N.state.NAME`."""


@dataclass(frozen=True)
class Layout:
    """How the optimizer's state is divided.

    Attributes:
        sizes: Number of elements of each complete parameter of each group.
        zero: The ZeRO stage.
        ranks: Number of ranks.
    """

    sizes: Sequence[Sequence[int]]
    zero: int
    ranks: int

    def first_tensor(self, group: int) -> int:
        """The number of a group's first tensor in the names of a part."""
        if self.zero == 0:
            return sum(len(sizes) for sizes in self.sizes[:group])
        return group

    def slice_sizes(self, group: int) -> list[int]:
        """Stage 3: the number of elements of each parameter of a group on one rank, padding included."""
        return [ceil(size / self.ranks) for size in self.sizes[group]]

    def tensor_sizes(self, group: int) -> list[int]:
        """The number of elements of each tensor of a group on one rank, without padding at the end."""
        if self.zero == 0:
            return list(self.sizes[group])
        if self.zero < 3:
            return [ceil(sum(self.sizes[group]) / self.ranks)]
        return [sum(self.slice_sizes(group))]


def unshard(parts: Sequence[Part], layout: Layout) -> dict[str, Tensor]:
    """Join the parts of all ranks to full vectors.

    Args:
        parts: The part of each rank of the layout, in order.
        layout: The layout that the parts were saved in.

    Returns:
        `G.master` and `G.state.NAME` of each group G, `[elements of the group]`. Step counts, of one element, stay as
        they are.

    Raises:
        UserError: The parts are not of this layout.
    """
    _check(parts, layout)
    full = {}
    for group in range(len(layout.sizes)):
        first = layout.first_tensor(group)
        for kind in _kinds(parts[0], first):
            if _is_count(kind):
                full[f"{group}.{kind}"] = parts[0][f"{first}.{kind}"]
            else:
                full[f"{group}.{kind}"] = _full_vector(parts, layout, group, kind)
    return full


def shard(full: Part, layout: Layout, rank: int, shapes: Sequence[torch.Size]) -> dict[str, Tensor]:
    """Divide full vectors, and return the part of one rank.

    Args:
        full: Full vectors, as returned by `unshard`.
        layout: The layout of the part.
        rank: The rank that the part is for.
        shapes: Shapes of the tensors that the rank's optimizer steps.

    Returns:
        Copies, under the layout's names.
    """
    part: dict[str, Tensor] = {}
    for name, vector in full.items():
        number, _, kind = name.partition(".")
        group = int(number)
        first = layout.first_tensor(group)
        if layout.zero == 0:
            for i, tensor in enumerate(_parameters(vector, layout.sizes[group], kind)):
                part[f"{first + i}.{kind}"] = tensor if _is_count(kind) else tensor.view(shapes[first + i])
        elif _is_count(kind):
            part[name] = vector
        elif layout.zero < 3:
            part[name] = _slice(vector, rank, shapes[group].numel())
        else:
            part[name] = _padded(_slices_of_parameters(vector, layout, group, rank), shapes[group].numel())
    return {name: tensor.clone() for name, tensor in part.items()}


def _check(parts: Sequence[Part], layout: Layout) -> None:
    """Raise UserError unless the tensors of all parts have the names and sizes of a layout."""
    mistake = f"is not of {layout.ranks} ranks at ZeRO stage {layout.zero}"
    count = layout.first_tensor(len(layout.sizes))
    masters = {f"{number}.master" for number in range(count)}
    for part in parts:
        if {name for name in part if name.endswith(".master")} != masters:
            raise UserError(f"the optimizer's state {mistake}")
    for group in range(len(layout.sizes)):
        first = layout.first_tensor(group)
        for number, size in enumerate(layout.tensor_sizes(group), start=first):
            for kind in _kinds(parts[0], first):
                name = f"{number}.{kind}"
                if not all(name in part and _fits(kind, part[name], size, layout) for part in parts):
                    raise UserError(f"the optimizer's {name} {mistake}")


def _fits(kind: str, tensor: Tensor, size: int, layout: Layout) -> bool:
    if _is_count(kind):
        return tensor.numel() == 1
    return tensor.numel() == size if layout.zero == 0 else tensor.dim() == 1 and len(tensor) >= size


def _full_vector(parts: Sequence[Part], layout: Layout, group: int, kind: str) -> Tensor:
    """One kind of state of a group: its parameters end to end, without padding."""
    sizes = layout.sizes[group]
    if layout.zero == 0:
        first = layout.first_tensor(group)
        return torch.cat([parts[0][f"{first + i}.{kind}"].flatten() for i in range(len(sizes))])
    vectors = [part[f"{group}.{kind}"] for part in parts]
    if layout.zero < 3:
        return torch.cat(vectors)[: sum(sizes)]
    slice_sizes = layout.slice_sizes(group)
    slices_by_rank = [torch.split(vector[: sum(slice_sizes)], slice_sizes) for vector in vectors]
    slices_by_parameter = zip(*slices_by_rank, strict=True)
    return torch.cat([torch.cat(slices)[:size] for slices, size in zip(slices_by_parameter, sizes, strict=True)])


def _parameters(vector: Tensor, sizes: Sequence[int], kind: str) -> list[Tensor]:
    """Stage 0: one flat tensor per parameter of a group; each gets the same step count."""
    if _is_count(kind):
        return [vector] * len(sizes)
    return list(torch.split(vector, list(sizes)))


def _slices_of_parameters(vector: Tensor, layout: Layout, group: int, rank: int) -> Tensor:
    """Stage 3: one rank's slice of each parameter of a group, end to end."""
    parameters = torch.split(vector, list(layout.sizes[group]))
    slice_sizes = layout.slice_sizes(group)
    return torch.cat([_slice(p, rank, size) for p, size in zip(parameters, slice_sizes, strict=True)])


def _kinds(part: Part, number: int) -> list[str]:
    """What a part holds of its N-th tensor: `master`, `state.NAME` and so on."""
    prefix = f"{number}."
    return [name.removeprefix(prefix) for name in part if name.startswith(prefix)]


def _is_count(kind: str) -> bool:
    return kind == "state.step"


def _slice(vector: Tensor, rank: int, length: int) -> Tensor:
    """The rank-th slice of this length, padded with zeros at the end of the vector."""
    return _padded(vector[rank * length : (rank + 1) * length], length)


def _padded(vector: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(vector, (0, length - len(vector)))
