import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from align.learner.reshard import Layout, shard, unshard
from policies.errors import UserError

SIZES = [[6, 5, 1], [7]]


def full_vectors(sizes: list[list[int]]) -> dict[str, torch.Tensor]:
    full = {}
    for group, group_sizes in enumerate(sizes):
        for kind in ("master", "state.exp_avg", "state.exp_avg_sq"):
            full[f"{group}.{kind}"] = torch.randn(sum(group_sizes))
        full[f"{group}.state.step"] = torch.tensor([3.0])
    return full


def shapes_of(layout: Layout) -> list[torch.Size]:
    """The shapes of what a rank's optimizer steps, including DeepSpeed's padding at the end."""
    shapes = []
    for group, sizes in enumerate(layout.sizes):
        if layout.zero == 0:
            shapes += [torch.Size([size]) for size in sizes]
        elif layout.zero < 3:
            shapes.append(torch.Size([-(-sum(sizes) // (2 * layout.ranks)) * 2]))
        else:
            shapes.append(torch.Size([sum(layout.slice_sizes(group))]))
    return shapes


def all_parts(full: dict[str, torch.Tensor], layout: Layout) -> list[dict[str, torch.Tensor]]:
    shapes = shapes_of(layout)
    return [shard(full, layout, rank, shapes) for rank in range(layout.ranks)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    zero=st.integers(0, 3),
    ranks=st.integers(1, 4),
)
def test_unshard_undoes_shard(sizes: list[list[int]], zero: int, ranks: int) -> None:
    before = full_vectors(sizes)
    layout = Layout(sizes, zero, ranks)
    shapes = shapes_of(layout)
    parts = all_parts(before, layout)
    for part in parts:
        masters = [part[f"{i}.master"].shape for i in range(len(shapes))]
        assert masters == shapes
    after = unshard(parts, layout)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("saved_zero", "claimed_zero"), [(0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0), (2, 3)])
def test_parts_of_another_layout_are_refused(saved_zero: int, claimed_zero: int) -> None:
    parts = all_parts(full_vectors(SIZES), Layout(SIZES, saved_zero, ranks=2))
    with pytest.raises(UserError, match=rf"is not of 2 ranks at ZeRO stage {claimed_zero}"):
        unshard(parts, Layout(SIZES, claimed_zero, ranks=2))


def test_a_rank_that_lacks_a_tensor_is_refused() -> None:
    layout = Layout(SIZES, zero=2, ranks=2)
    first, second = all_parts(full_vectors(SIZES), layout)
    second.pop("1.state.exp_avg")
    with pytest.raises(UserError, match=r"the optimizer's 1\.state\.exp_avg is not of 2 ranks"):
        unshard([first, second], layout)


@pytest.mark.parametrize(("old", "new"), itertools.permutations([(1, 0), (2, 2), (3, 3)], 2))
def test_another_layout_holds_the_same_numbers(old: tuple[int, int], new: tuple[int, int]) -> None:
    state = full_vectors(SIZES)
    for ranks, zero in (old, new):
        layout = Layout(SIZES, zero, ranks)
        state = unshard(all_parts(state, layout), layout)
    for name, tensor in full_vectors(SIZES).items():
        assert state[name].shape == tensor.shape


def test_layouts_are_those_of_the_picture_in_the_module() -> None:
    full = {"0.master": torch.arange(1.0, 9.0)}  # a is 1 to 5, b is 6 to 8
    sizes = [[5, 3]]

    def masters(zero: int, shapes: list[torch.Size]) -> list[list[float]]:
        layout = Layout(sizes, zero, ranks=2)
        return [shard(full, layout, rank, shapes)["0.master"].tolist() for rank in range(2)]

    assert masters(2, [torch.Size([4])]) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert masters(3, [torch.Size([5])]) == [[1, 2, 3, 6, 7], [4, 5, 0, 8, 0]]
    parameters = shard(full, Layout(sizes, 0, 1), 0, [torch.Size([5]), torch.Size([3])])
    assert {name: tensor.tolist() for name, tensor in parameters.items()} == {
        "0.master": [1, 2, 3, 4, 5],
        "1.master": [6, 7, 8],
    }
