import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.runtime.failures import Fault
from align.supervised.trainer import LengthGroups, SkipNonFinite

example_lengths = st.lists(st.integers(1, 100), min_size=1, max_size=300)


@given(example_lengths, st.integers(1, 32), st.integers(0, 99))
def test_every_example_once_per_epoch(lengths: list[int], batch_size: int, seed: int) -> None:
    order = list(LengthGroups(lengths, batch_size, seed))
    assert sorted(order) == list(range(len(lengths)))


def test_epochs_differ_and_each_repeats_exactly() -> None:
    groups = LengthGroups(list(range(200)), batch_size=8, seed=0)
    first = list(groups)
    groups.set_epoch(1)
    second = list(groups)
    groups.set_epoch(0)
    assert list(groups) == first != second
    assert list(LengthGroups(list(range(200)), batch_size=8, seed=1)) != first


def test_the_examples_of_a_batch_are_of_similar_length() -> None:
    lengths = [index % 100 for index in range(6400)]
    order = list(LengthGroups(lengths, batch_size=32, seed=0))
    batches = [[lengths[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
    assert max(max(batch) - min(batch) for batch in batches) <= 5
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)


def test_steps_with_non_finite_gradients_are_skipped_and_several_in_a_row_end_training() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.register_step_pre_hook(SkipNonFinite(2, "sft"))

    def step(gradient: float) -> None:
        weight.grad = torch.full((2,), gradient)
        optimizer.step()

    step(float("nan"))
    assert weight.tolist() == [1.0, 1.0]
    step(1.0)
    moved = weight.tolist()
    assert moved != [1.0, 1.0]
    step(float("inf"))
    with pytest.raises(Fault, match=r"in 2 consecutive steps \(sft\.max_skipped\)"):
        step(float("inf"))
    assert weight.tolist() == moved
