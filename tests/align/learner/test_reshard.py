import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.learner.reshard import shard, unshard

SIZES = [[6, 5, 1], [7]]


def whole(sizes: list[list[int]]) -> dict[str, torch.Tensor]:
    made = {}
    for group, own in enumerate(sizes):
        for kind in ("master", "state.exp_avg", "state.exp_avg_sq"):
            made[f"{group}.{kind}"] = torch.randn(sum(own))
        made[f"{group}.state.step"] = torch.tensor([3.0])
    return made


def shapes_of(sizes: list[list[int]], zero: int, ranks: int) -> list[torch.Size]:
    """Of what a rank's optimizer steps, DeepSpeed's padding at the end included."""
    if zero == 0:
        return [torch.Size([size]) for own in sizes for size in own]
    if zero < 3:
        return [torch.Size([-(-sum(own) // (2 * ranks)) * 2]) for own in sizes]
    return [torch.Size([sum(-(-size // ranks) for size in own)]) for own in sizes]


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    zero=st.integers(0, 3),
    ranks=st.integers(1, 4),
)
def test_what_is_cut_joins_again(sizes: list[list[int]], zero: int, ranks: int) -> None:
    before = whole(sizes)
    shapes = shapes_of(sizes, zero, ranks)
    parts = [shard(before, sizes, zero, rank, ranks, shapes) for rank in range(ranks)]
    for part in parts:
        masters = [part[f"{i}.master"].shape for i in range(len(shapes))]
        assert masters == shapes
    after = unshard(parts, sizes, zero)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("old", "new"), itertools.permutations([(1, 0), (2, 2), (3, 3)], 2))
def test_another_layout_holds_the_same_numbers(old: tuple[int, int], new: tuple[int, int]) -> None:
    state = whole(SIZES)
    for ranks, zero in (old, new):
        shapes = shapes_of(SIZES, zero, ranks)
        parts = [shard(state, SIZES, zero, rank, ranks, shapes) for rank in range(ranks)]
        state = unshard(parts, SIZES, zero)
    for name, tensor in whole(SIZES).items():
        assert state[name].shape == tensor.shape
