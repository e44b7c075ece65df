from hypothesis import given
from hypothesis import strategies as st

from align.fit import LengthGroups

row_lengths = st.lists(st.integers(1, 100), min_size=1, max_size=300)


@given(row_lengths, st.integers(1, 32), st.integers(0, 99))
def test_every_row_once_an_epoch(lengths: list[int], batch: int, seed: int) -> None:
    order = list(LengthGroups(lengths, batch, seed))
    assert sorted(order) == list(range(len(lengths)))


def test_epochs_differ_and_are_the_same_when_asked_again() -> None:
    groups = LengthGroups(list(range(200)), batch=8, seed=0)
    first = list(groups)
    groups.set_epoch(1)
    second = list(groups)
    groups.set_epoch(0)
    assert list(groups) == first != second
    assert list(LengthGroups(list(range(200)), batch=8, seed=1)) != first


def test_rows_of_a_batch_are_of_about_one_length() -> None:
    lengths = [index % 100 for index in range(6400)]
    order = list(LengthGroups(lengths, batch=32, seed=0))
    batches = [[lengths[i] for i in order[start : start + 32]] for start in range(0, len(order), 32)]
    assert max(max(batch) - min(batch) for batch in batches) <= 5
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)
